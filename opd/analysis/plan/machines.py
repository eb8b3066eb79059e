"""A machine on which a step is planned: memory, rates, and the shares of them that work attains.

Nothing here was measured on a GPU; the shares are what well-tuned training and decoding usually
attain.
"""

from dataclasses import dataclass

from opd.analysis.plan.operation_times import OperationTimes

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device and its links."""

    name: str
    """Name for the report."""
    kind: str
    """"cuda" or "cpu"."""
    memory: float
    """Bytes of memory of one device."""
    half_flops: float
    """Peak floating-point operations a second of bfloat16 products."""
    float32_flops: float
    """The same of float32 products, without TensorFloat-32."""
    bandwidth: float
    """Peak bytes a second of the memory."""
    elementwise_bandwidth: float
    """Bytes a second of exponentials, softmaxes, sorts and the like."""
    link: float = 32 * GB
    """Bytes a second and direction to another device."""
    flops_share: float = 0.5
    """Share of the peak FLOPs that products attain."""
    bandwidth_share: float = 0.7
    """Share of the peak bandwidth that memory and links attain."""
    seconds_per_operation: float = 6e-6
    """Seconds to start one operation from Python, modules of the model included; those of a
    compiled decoding loop are not counted."""
    seconds_per_backward_operation: float = 6e-6
    """Seconds to start one operation of a backward pass."""
    seconds_per_token: float = 5e-4
    """Seconds of a step of decoding in `generate`, outside of the model."""
    fixed_reserve: float = 1.0 * GB
    """Bytes of the CUDA context and workspaces; on a CPU of code that is loaded in the first step,
    and of buffers of libraries."""
    fragmentation: float = 0.06
    """Share of the tensors' memory that the allocator cannot use."""
    operation_times: OperationTimes | None = None
    """Measured times of small operations, which hold instead of the rates; None for the rates."""
    cache_bytes: float = 0.0
    """Bytes that a core's caches hold; read where operations are measured."""

    def start_seconds(self, is_backward: bool) -> float:
        """Return the time to start an operation.

        Args:
            is_backward: Whether autograd starts it in a backward pass.

        Returns:
            Seconds.
        """
        return self.seconds_per_backward_operation if is_backward else self.seconds_per_operation

    def work_seconds(
        self, flops: float, moved_bytes: float, item_bytes: int, elementwise: bool
    ) -> float:
        """Return the time of one operation: the slower of arithmetic and memory (roofline).

        Args:
            flops: Floating-point operations of products.
            moved_bytes: Bytes read and written.
            item_bytes: Bytes of a number, which select the rate of products.
            elementwise: Whether `elementwise_bandwidth` holds instead of the memory's.

        Returns:
            Seconds, without its start.
        """
        rate = self.half_flops if item_bytes < 4 else self.float32_flops
        bandwidth = self.bandwidth * self.bandwidth_share
        if elementwise:
            bandwidth = min(bandwidth, self.elementwise_bandwidth)
        return max(flops / (rate * self.flops_share), moved_bytes / bandwidth)
