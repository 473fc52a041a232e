"""What a process's own sockets have sent: no other program on the machine can disturb the count."""

import os
import socket
import stat
import struct

_BYTES_SENT, _BYTES_SENT_AGAIN = 200, 208
"""Where linux/tcp.h's struct tcp_info has tcpi_bytes_sent and tcpi_bytes_retrans (Linux 4.19): payload, and what of it came again."""


def sent_bytes() -> int:
    """Payload that the TCP sockets of this process have sent so far, each byte once."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                    information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, again = (struct.unpack_from("Q", information, place)[0] for place in (_BYTES_SENT, _BYTES_SENT_AGAIN))
                    total += sent - again
        except FileNotFoundError:
            continue  # the descriptor by which the folder was listed
    return total
