"""Published models and machines by name, and the work of a step: what plans and benchmarks are about."""

from dataclasses import dataclass

from tritium.model.config import ModelConfig


def llama(e: int, f: int, layers: int, heads: int, kv: int, d: int, v: int, tied: bool, qk_norm=False) -> ModelConfig:
    return ModelConfig(v, e, f, layers, heads, kv, d, max_positions=131072, tie_embeddings=tied, qk_norm=qk_norm)


# As the config.json of Llama 3.2 1B and 3B, Llama 3.1 8B and 70B, and Qwen3 32B.
PRESETS = {
    "1b": llama(2048, 8192, 16, 32, 8, 64, 128256, True),
    "3b": llama(3072, 8192, 28, 24, 8, 128, 128256, True),
    "8b": llama(4096, 14336, 32, 32, 8, 128, 128256, False),
    "32b": llama(5120, 25600, 64, 64, 8, 128, 151936, False, True),
    "70b": llama(8192, 28672, 80, 64, 8, 128, 128256, False),
}


@dataclass(frozen=True)
class Machine:
    """What one GPU of a cluster has. Rates are a datasheet's; `reached` is the share of them that is counted on."""

    name: str
    node: int  # GPUs of a host
    memory: float  # bytes
    flops: float  # FLOP/s of dense bf16 matmuls
    flops_fp32: float  # and of fp32 ones
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to its host's other GPUs, in one direction
    network: float  # bytes/s to other hosts, in one direction: its share of the host's adapters
    host: float  # bytes/s of its share of the host's memory, which its PCIe link about equals
    reached: float = 0.7  # an assumption; 1 for measured rates
    device: str = "cuda"  # "cpu": the torch paths, which keep and make more


# NVIDIA's datasheets of the SXM modules, NVLink's sum of both directions halved; an adapter of 400 Gb/s per GPU, as DGX
# hosts have (A100: 200), and PCIe 5 (A100: 4) with 16 lanes.
MACHINES = {
    "a100": Machine("a100", 8, 80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 32e9),
    "h100": Machine("h100", 8, 80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9, 64e9),
    "h200": Machine("h200", 8, 141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9, 64e9),
}


@dataclass(frozen=True)
class Work:
    """A step of one data-parallel replica: `micro_batches` streams of documents of `context` tokens."""

    tokens: int  # T of a micro-batch
    context: int
    micro_batches: int = 1
    supervised: int | None = None  # tokens of this rank that meet the head (all of them where not given)
    dtype: str = "bf16"  # of the parameters
    muon: bool = False  # moves the layers' matrices
    offload: bool = False  # of what the optimizer keeps, to the host
    ema: bool = False  # whether it keeps a running mean of the weights
    passes: int = 0  # forward passes of the trained model without a gradient, per micro-batch (old log-probs)
    frozen: int = 0  # other models of its shape, each with one such pass (a reference)
    sequences: int = 0  # that are sampled together, and how long their caches are
    sampled_tokens: int = 0
