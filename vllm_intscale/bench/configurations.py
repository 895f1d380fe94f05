"""What `intscale bench serve` runs: vLLM's quantizations by name, on one GPU or several."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_intscale.bench.engine_worker import GROUP_SCALES
from vllm_intscale.bench.random_checkpoint import weights_of, write_config, write_random
from vllm_intscale.checkpoint import read_config
from vllm_intscale.errors import IntScaleError

AT_ONCE = 5  # beside the control, where they have room: starting takes longer than timing
# Bytes that an engine takes beside weights and cache: 5.5 GiB were seen (Mixtral-8x7B, batches of
# 16384 tokens, H100).
OTHER_BYTES = 6 << 30
EXPERTS = "num_local_experts"  # of config.json
TP, PP = "tensor_parallel_size", "pipeline_parallel_size"


class Configuration(NamedTuple):
    """How vLLM runs a model: the checkpoint's format, engine options and environment.

    log, experts_log: what the log says if dense layers and experts get the kernel that is meant,
    regular expressions; None if there is none for experts.
    """

    format: str
    log: str
    experts_log: str | None
    options: Mapping[str, Any] = {}
    environment: Mapping[str, str] = {}


OURS = r"\d+ on sm\d+_w4a8_gemm", r"MoE of \d+ experts W4A8.* on sm\d+_w4a8_gemm"
MARLIN_ONLY = {"linear_backend": "marlin", "moe_backend": "marlin"}
MARLIN = "Marlin", "Using '?MARLIN'? WNA16 MoE", MARLIN_ONLY
DUMMY = {"load_format": "dummy"}  # vLLM's random floats instead of files: 141 GB of a 70B
CONFIGURATIONS = {
    "intscale": Configuration("intscale", *OURS),
    "bf16": Configuration("bf16", "", r"Using \w+ Unquantized MoE", DUMMY),
    "fp8": Configuration("fp8", r"Cutlass\w*FP8", r"Using \w+ Fp8 MoE"),
    "machete_w4a16": Configuration("w4a16", "Machete", None),
    "w8a8_int8": Configuration("w8a8_int8", r"Cutlass\w*Int8", r"Using \w+ Int8 MoE"),
    "marlin_w4a16": Configuration("gptq", *MARLIN),
    "marlin_w4a8_int8": Configuration("gptq", *MARLIN, {"VLLM_MARLIN_INPUT_DTYPE": "int8"}),
    "w4a8_fp8": Configuration("w4a8_fp8", "CutlassW4A8", "Using CUTLASS W4A8 MoE"),
    "humming_w4a8_int8": Configuration(
        *("gptq", "quantization=humming", "Humming MoE"),
        {"quantization": "humming"},  # all its layers
        {"VLLM_HUMMING_INPUT_QUANT_CONFIG": '{"dtype":"int8"}'},
    ),
    "intscale_unfused": Configuration("intscale", *OURS, {}, {"INTSCALE_FUSE": "0"}),
    **{
        f"intscale_{kind}_scale": Configuration(
            *("intscale", rf"group scales: {kind}\n(?s:.*)wgmma, accumulate form", None, {}),
            {"INTSCALE_FORM": "accumulate", GROUP_SCALES: kind},
        )
        for kind in ("integer", "float")
    },
}

ON_GPUS = re.compile(r"(\w+)_(tp|pp|ep)([1-9]\d*)")


def configuration_of(name: str) -> Configuration:
    """One of CONFIGURATIONS; or NAME_tp2, NAME_pp2, NAME_ep2: that on two GPUs, or so many.

    They share each tensor, the layers, or the experts and all other tensors. Raises IntScaleError
    for an unknown name.
    """
    options: dict[str, Any] = {}
    known = name
    if match := ON_GPUS.fullmatch(name):
        known, kind, gpus = match.groups()
        options = {PP if kind == "pp" else TP: int(gpus)}
        options |= {"enable_expert_parallel": True} if kind == "ep" else {}
    if known not in CONFIGURATIONS:
        names = ", ".join(CONFIGURATIONS)
        raise IntScaleError(
            f"configuration {name!r} is unknown; there are {names}, and each of them on N GPUs as "
            "NAME_tpN, NAME_ppN or NAME_epN"
        )
    found = CONFIGURATIONS[known]
    if options and GROUP_SCALES in found.environment:
        raise IntScaleError(f"configuration {name!r}: {known} runs in one process, on one GPU")
    return found._replace(options={**found.options, **options})


class Plan(NamedTuple):
    """A configuration to be run: its checkpoint and all arguments of vllm.LLM."""

    name: str
    weight_bytes: int
    arguments: Mapping[str, Any]

    @property
    def bytes_needed(self) -> float:
        """Of each of its GPUs."""
        weights = self.weight_bytes / gpus_of(self.arguments)
        return weights + float(self.arguments["kv_cache_memory_bytes"]) + OTHER_BYTES


def plan_of(
    name: str, model: Mapping[str, Any], folder: Path, tokens: int, engine: Mapping[str, Any]
) -> Plan:
    """Write the checkpoint if it is not in `folder`; ask for a KV cache of so many tokens, no more.

    model: config.json of `random_checkpoint`. engine: more arguments of vllm.LLM. Raises
    IntScaleError for a model with experts if the configuration has no kernel for them.
    """
    configuration = configuration_of(name)
    if model.get(EXPERTS) and configuration.experts_log is None:
        raise IntScaleError(f"{name}: it has no kernel for experts")
    dummy = configuration.options.get("load_format") == "dummy"
    write = write_config if dummy else write_random
    checkpoint = folder / configuration.format
    if not checkpoint.exists():
        unfinished = folder / f"{configuration.format}.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        write(model, unfinished, configuration.format)
        unfinished.rename(checkpoint)
        torch.cuda.empty_cache()  # it was made there
    files = (file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    weight_bytes = weights_of(model) * torch.bfloat16.itemsize if dummy else sum(files)
    heads = model["num_key_value_heads"], model["hidden_size"] // model["num_attention_heads"]
    size = 2 * torch.bfloat16.itemsize * model["num_hidden_layers"] * heads[0] * heads[1]
    arguments = {"model": str(checkpoint), **engine, **configuration.options}
    cache = tokens * size // gpus_of(arguments)
    arguments = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": cache, **arguments}
    return Plan(name, weight_bytes, arguments)


def gpus_of(arguments: Mapping[str, Any]) -> int:
    """On how many GPUs an engine runs."""
    return int(arguments.get(TP, 1) * arguments.get(PP, 1))


def gpu_bytes() -> float:
    """Of memory, of the smallest GPU; without one there is no limit."""
    gpus = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(i).total_memory for i in gpus), default=math.inf)


def groups_of(plans: Iterable[Plan], room: float) -> list[list[Plan]]:
    """Those that run at once, in their order: AT_ONCE at most that need no more bytes than `room`.

    One that needs more is a group of its own.
    """
    groups: list[list[Plan]] = []
    for plan in plans:
        group = [*groups[-1], plan] if groups else []
        if group and len(group) <= AT_ONCE and sum(p.bytes_needed for p in group) <= room:
            groups[-1] = group
        else:
            groups.append([plan])
    return groups


def check_log(plan: Plan, log: Path) -> None:
    """Raise IntScaleError if it does not show that the configuration's kernels run."""
    configuration, text = configuration_of(plan.name), log.read_text()
    patterns = [configuration.log]
    if EXPERTS in read_config(Path(plan.arguments["model"])):
        assert configuration.experts_log is not None  # see plan_of
        patterns.append(configuration.experts_log)
    for pattern in patterns:
        if not re.search(pattern, text):
            raise IntScaleError(
                f"{plan.name}: its log does not say {pattern!r}, so that another kernel may run; "
                f"see {log}"
            )
