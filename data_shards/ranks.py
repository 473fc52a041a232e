"""Ranks: the process group, and the few collectives the trainer uses."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class PeerLost(RuntimeError):
    """A collective failed because another rank died or stopped answering."""


def rank() -> int:
    """This process's number among all ranks; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks take part; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_0() -> bool:
    """Whether this rank writes what is written once."""
    return rank() == 0


def device() -> torch.device:
    """The device of this rank: its CUDA device where there is one (shared if there are more ranks than devices), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def to_device(tensor: Tensor) -> Tensor:
    """The tensor on this rank's device: on the CPU itself; to a GPU through pinned memory, so that the host does not wait for the copy."""
    target = device()
    if tensor.device.type != "cpu" or target.type != "cuda":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)


def init_process_group(*, timeout_seconds: float) -> None:
    """Join the ranks named by torch's standard variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    A launcher on one host passes rank 0 a listening socket as HALFSTEP_STORE_FD; others have reserved MASTER_PORT on the address
    MASTER_ADDR. Either way no port can be taken in between, and the store listens on that address only.
    Raises: RuntimeError if not all ranks come within `timeout_seconds`. Collective."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        torch.backends.cudnn.allow_tf32 = False  # engine.precision=fp32 means fp32
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        return
    if size == 1:  # sharded engines want a group, if only of themselves
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        return
    number, limit = int(os.environ["RANK"]), timedelta(seconds=timeout_seconds)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        address,
        port,
        size,
        is_master=number == 0,
        timeout=limit,
        master_listen_fd=_listening_socket(address, port) if number == 0 else None,
        use_libuv=True,
    )
    # nccl refuses two ranks on one device; gloo carries CUDA tensors too.
    apart = torch.cuda.is_available() and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if apart else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=limit)


def _listening_socket(address: str, port: int) -> int:
    """Descriptor of the socket on which rank 0's store listens."""
    inherited = os.environ.get("HALFSTEP_STORE_FD")
    if inherited:
        return int(inherited)
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as the launcher that reserved the port did
    try:
        listening.bind((address, port))
        listening.listen(1024)
    except OSError as error:
        raise PeerLost(f"rank 0 on {socket.gethostname()} cannot listen on {address}:{port}: {error}") from error
    return listening.detach()


def destroy_process_group() -> None:
    """Leave the process group in an orderly way. Collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> None:
    """Add up `tensor` over the ranks, in place, in an order that depends on its size and the world size alone.

    Raises: PeerLost. Collective."""
    if world_size() > 1:
        with _PeerErrors("all_reduce"):
            dist.all_reduce(tensor)


def all_gather_tensor(tensor: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Stack the ranks' tensors, which have one shape and dtype, along a new first axis.

    group: another group of all ranks than the default one. Raises: PeerLost. Collective."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    with _PeerErrors("all_gather"):
        dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def all_gather_text(text: str, *, group: dist.ProcessGroup | None = None) -> list[str]:
    """Every rank's text, of any length, in rank order. Raises: PeerLost. Collective."""
    content = text.encode()
    if world_size() == 1:
        return [text]
    lengths = all_gather_tensor(torch.tensor([len(content)]), group=group).flatten().tolist()
    padded = torch.frombuffer(bytearray(content.ljust(max(1, *lengths), b"\0")), dtype=torch.uint8)
    rows = all_gather_tensor(padded, group=group)
    return [row.numpy().tobytes()[:length].decode() for row, length in zip(rows, lengths, strict=True)]


def new_cpu_group(*, timeout_seconds: float) -> dist.ProcessGroup | None:
    """Another gloo group of all ranks, for a thread that must not get in the way of the main one; None for a single rank. Collective."""
    if world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    assert isinstance(group, dist.ProcessGroup), "every rank belongs to it"
    return group


def destroy_group(group: dist.ProcessGroup | None) -> None:
    """Give a group of `new_cpu_group` back. Collective."""
    if group is not None:
        dist.destroy_process_group(group)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank. Raises: PeerLost. Collective."""
    value = torch.tensor([float(flag)])
    all_reduce_sum(value)
    return bool(value.item())


def barrier() -> None:
    """Return when every rank has come here. Raises: PeerLost. Collective."""
    any_rank(False)


def share(total: int) -> range:
    """The indices of range(total) that this rank takes: contiguous, shares of all ranks differ by at most one."""
    first, last = (total * number // world_size() for number in (rank(), rank() + 1))
    return range(first, last)


class _PeerErrors:
    """Turn the RuntimeError of a broken collective into PeerLost, which names rank and host."""

    def __init__(self, collective: str) -> None:
        self.collective = collective

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is not None and issubclass(kind, RuntimeError):
            place = f"rank {rank()} on {socket.gethostname()}"
            raise PeerLost(f"{place}: a peer was lost in {self.collective}: {error}; run the same command again to resume") from error
