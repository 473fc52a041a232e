"""What a process's own sockets have sent: no other program on the machine can disturb the count."""

import os
import socket
import stat
import struct

_BYTES_SENT = 200
"""Where linux/tcp.h's struct tcp_info has tcpi_bytes_sent, since Linux 4.19: payload, what is sent again included."""


def sent_bytes() -> int:
    """Payload that the TCP sockets of this process have sent so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                    information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", information, _BYTES_SENT)[0]
        except FileNotFoundError:
            continue  # the descriptor by which the folder was listed
    return total
