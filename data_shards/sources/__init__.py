"""What can be packed: rows of faces, folders, Parquet files and foreign tars."""
