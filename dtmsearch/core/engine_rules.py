"""What engines that serve models take of a folder of compressed-tensors: schemes, widths, groups, shapes, mixtures.

Read in the engines' own sources on 2026-11-28; what was run besides stands in docs/formats.md. An engine's rules are
those of its newest release then, on the devices that `where` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dtmsearch.core.schemes import Scheme, parse_scheme
from dtmsearch.core.served_schemes import SERVED

Shape = tuple[int, int]
TOLD = "2026-11-28"
# Group sizes and widths of weight-only integers.
_GROUPS = (16, 32, 48, 64, 128, 256)
_CPU_MULTIPLE = 32
_MARLIN_GROUPS = (32, 64, 128)


def _all(*names: str) -> frozenset[str]:
    return frozenset(names)


@dataclass(frozen=True)
class EngineRules:
    """Of an engine by the name of `--runtime`. `says` is its own name and release, `where` the devices that are meant.
    `served` are the schemes of FP8, NVFP4, MX and rounded activations that it takes; `integers` says why weight-only
    integers cannot be, None where they can. `where_served` are devices that some of the former need. `fuses`: it runs
    q, k, v and gate, up as one matrix each, of one scheme. `mixes`: layers may be in several formats. `instead` is what
    else it reads, where it takes no folder of compressed-tensors at all. `embeddings`: why it takes no quantized ones.
    `caches`: schemes that a folder may give the keys and values of all layers.
    `slow`: schemes that it runs as nobody would serve them, and why."""

    name: str
    says: str
    where: str
    served: frozenset[str] = frozenset()
    integers: Callable[[Scheme, Shape], str | None] = lambda scheme, shape: None
    where_served: Mapping[str, str] | None = None
    fuses: bool = True
    mixes: bool = True
    instead: str = ""
    embeddings: str | None = None
    caches: frozenset[str] = frozenset()
    slow: Mapping[str, str] | None = None

    def obstacle(self, scheme: Scheme, shape: Shape) -> str | None:
        """Why the engine does not take a matrix [rows, cols] under a scheme that the format has; None where it does."""
        if self.instead:
            return self.instead
        if scheme.is_unquantized or scheme.is_source:
            return None
        if scheme.weights is None:
            return self.integers(scheme, shape)
        name = scheme.scaled or scheme.name
        if (slow := (self.slow or {}).get(name)) is not None:
            return slow
        if name not in self.served and not (_is_w4a8(scheme) and "w4a8-g128" in self.served):
            return f"{self.says} has no kernel for it {self.where}"
        if scheme.weights.grain == "block" and shape[0] % scheme.weights.size and self.fuses:
            return f"blocks of what it runs as one matrix want rows in a multiple of {scheme.weights.size}"
        return None

    def repair(self, scheme: Scheme, shape: Shape, dense_bits: int) -> str | None:
        """The smallest scheme of no fewer bits that it takes for such a matrix, of the same kind if there is one: its
        name; None where it takes none."""
        own = scheme.stored_bits(shape, dense_bits)
        rounds = scheme.rounds_activations and scheme.weights is not None
        named = [name for names in SERVED.values() for name in names] if scheme.weights is not None else _INTEGERS
        for candidates in (named, _INTEGERS):
            found = [parse_scheme(name) for name in candidates]
            fit = [
                (other.stored_bits(shape, dense_bits), other.name)
                for other in found
                if other.rounds_activations == (rounds and candidates is named)
                and other.misfit(shape) is None
                and not (other.granularity == "group" and shape[1] % other.group_size)
                and self.obstacle(other, shape) is None
                and other.stored_bits(shape, dense_bits) >= own
            ]
            if fit:
                return min(fit)[1]
        return None


_INTEGERS = [f"int{bits}-{grain}" for bits in range(2, 9) for grain in ("g128", "g64", "g32", "g16", "channel")]


def _is_w4a8(scheme: Scheme) -> bool:
    return (scheme.scaled or scheme.name).startswith("w4a8-")


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _vllm_integers(scheme: Scheme, shape: Shape) -> str | None:
    """vLLM's CompressedTensorsWNA16, whose kernel Humming takes what Marlin does not."""
    is_group = scheme.granularity == "group"
    if scheme.granularity == "tensor" or (is_group and scheme.group_size not in _GROUPS):
        return f"its kernels take scales of rows and of groups of {_listed(_GROUPS)}"
    return None


def _vllm_cpu_integers(scheme: Scheme, shape: Shape) -> str | None:
    """Its CPUWNA16LinearKernel."""
    if scheme.bits != 4:
        return "its kernel for CPUs reads 4 bits"
    if scheme.granularity == "tensor" or (scheme.granularity == "group" and scheme.group_size % 2):
        return "its kernel for CPUs takes scales of rows and of groups of an even number"
    if shape[0] % _CPU_MULTIPLE or shape[1] % _CPU_MULTIPLE:
        return f"its kernel for CPUs wants outputs and inputs in multiples of {_CPU_MULTIPLE}, not {list(shape)}"
    return None


def _sglang_integers(scheme: Scheme, shape: Shape) -> str | None:
    """SGLang's CompressedTensorsWNA16, by Marlin."""
    if scheme.bits not in (4, 8) or scheme.asymmetric:
        return "its kernels read 4 and 8 bits without zero points"
    if scheme.granularity == "tensor" or (scheme.granularity == "group" and scheme.group_size not in _MARLIN_GROUPS):
        return f"its kernels take scales of rows and of groups of {_listed(_MARLIN_GROUPS)}"
    return None


# Measured: 60 ns a multiplication on one core; its batches are padded to 17 tokens.
_FP8_ON_CPUS = (
    "vLLM 0.32 multiplies it on CPUs by torch._scaled_mm, which oneDNN carries out by its reference implementation "
    "(matmul,ref:any): tens of seconds a token of a model of 21 million weights"
)
CUTS_CACHES = (
    f"vLLM 0.32 ({TOLD}): its kernels for CPUs cut keys and values in e4m3 towards zero, where GPUs, and what was "
    "measured, round to the nearest: more diverges there"
)
_FP8_NEEDS = "compute capability 8.9; older GPUs round weights alone"
ENGINES: Mapping[str, EngineRules] = {
    rules.name: rules
    for rules in (
        EngineRules(
            *("transformers", "transformers 5.23 with compressed-tensors 0.20", "on every device"),
            served=frozenset(name for names in SERVED.values() for name in names),
            fuses=False,
            embeddings="transformers 5.23 asks embeddings for their own weight as it loads, and packed ones have none",
        ),
        EngineRules(
            *("vllm", "vLLM 0.32", "on NVIDIA GPUs"),
            served=_all("fp8-channel", "fp8-tensor", "fp8-block128", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16")
            | _all("mxfp8", "mxfp8a16", "w8a8-channel", "w4a8-g128", "w4afp8"),
            integers=_vllm_integers,
            caches=_all("kv-fp8"),
            where_served={
                **dict.fromkeys(("fp8-channel", "fp8-tensor", "fp8-block128"), _FP8_NEEDS),
                "nvfp4": "compute capability 10.0; older GPUs round weights alone",
                "mxfp4": "compute capability 10.0; older GPUs round weights alone",
                "mxfp4a16": "a GPU below compute capability 10.0; newer ones round activations too",
                "mxfp8": "compute capability 10.0; older GPUs round weights alone",
                "mxfp8a16": "a GPU below compute capability 10.0; newer ones round activations too",
                "w4afp8": "compute capability 9.0 exactly",
            },
        ),
        EngineRules(
            *("vllm-cpu", "vLLM 0.32", "on CPUs"),
            served=_all("w8a8-channel"),
            integers=_vllm_cpu_integers,
            caches=_all("kv-fp8"),
            embeddings="vLLM 0.32 looks packed embeddings up by a Triton kernel, which CPUs do not have",
            slow=dict.fromkeys(("fp8-channel", "fp8-tensor", "fp8-block128"), _FP8_ON_CPUS),
        ),
        EngineRules(
            *("sglang", "SGLang", "on NVIDIA GPUs"),
            served=_all("fp8-channel", "fp8-tensor", "w8a8-channel"),
            integers=_sglang_integers,
            embeddings="SGLang builds embeddings without quantization",
            where_served=dict.fromkeys(("fp8-channel", "fp8-tensor"), _FP8_NEEDS),
            mixes=False,
        ),
        EngineRules(
            *("tensorrt-llm", "TensorRT-LLM", "on NVIDIA GPUs"),
            fuses=False,
            instead="its PyTorch backend reads ModelOpt's folders (hf_quant_config.json): export --to modelopt",
        ),
        EngineRules(
            *("llama.cpp", "llama.cpp", "on every device"),
            fuses=False,
            instead="it reads GGUF files: export --to gguf, or --to gguf-recipe for its own quantizer",
        ),
    )
}


def where_note(engine: str, schemes: frozenset[str]) -> str | None:
    """What devices an engine needs for some of the schemes of a plan; None where none in particular."""
    needs = ENGINES[engine].where_served or {}
    found = [f"{name} needs {needs[name]}" for name in sorted(schemes) if name in needs]
    return f"{ENGINES[engine].says} ({TOLD}): {'; '.join(found)}" if found else None
