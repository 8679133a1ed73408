"""Limits: how long preflight may measure, and what it takes for sick."""

from __future__ import annotations

from dataclasses import dataclass

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Limits:
    """Thresholds of preflight. The time bounds hold for measurements that succeed; what cannot be interrupted is one
    fsync, the reading of one window, and one forward and backward pass."""

    min_bandwidth: float = 0.01
    """GB/s per rank and direction between nodes (within the node, if there is one only) below which the job is refused;
    the default is slower than any fabric that is in order."""
    slow_share: float = 0.5
    """Share of the median (of the nodes' best links) below which a link may be an outlier ..."""
    deviations: float = 5.0
    """... if it also lies so many scaled median absolute deviations below it."""
    nodes_to_compare: int = 4
    """Outliers are told among so many nodes or more; with fewer, only `min_bandwidth` judges."""
    link_seconds: float = 1.0
    """s for the messages of growing size over one link, four of 1 MiB at least; all pairs of a round talk at the same
    time."""
    answer_seconds: float = 30.0
    """s after which a message between two CPU processes counts as lost (devices: the process group's own timeout)."""
    message_bytes: int = 64 * MIB
    """Largest message between devices."""
    message_bytes_cpu: int = 8 * MIB
    """Largest message between CPU processes."""

    read_seconds: float = 2.0
    """s of reading windows of the training data."""
    read_bytes: int = 256 * MIB
    """Per rank, at most."""
    write_seconds: float = 2.0
    """s of writing to the run folder, before its fsync."""
    write_bytes: int = 64 * MIB
    """Per node, at most; one rank of every node writes, all at the same time."""
    write_bytes_together: int = 4 * GIB
    """Of all nodes, at most."""

    clock_seconds: float = 1.0
    """s a node's clock may differ from rank 0's node."""
    device_memory_share: float = 0.9
    """Share of the nodes' median free device memory below which a node is named."""
    host_memory_share: float = 0.5
    """The same for host memory."""
    rows: int = 32
    """Nodes of which the table has a row each; of more, only those with a finding are listed, and quantiles."""

    def message_sizes(self, device: str) -> list[int]:
        """Bytes, growing eightfold. The smallest is large enough for latency not to hide the bandwidth."""
        largest = self.message_bytes_cpu if device == "cpu" else self.message_bytes
        return [MIB << shift for shift in range(0, 30, 3) if MIB << shift <= largest]

    def write_bytes_per_node(self, nodes: int) -> int:
        return max(MIB, min(self.write_bytes, self.write_bytes_together // nodes))
