"""The quantization config: what vLLM asks to learn how each layer of a checkpoint is quantized.

`linear` and `moe` are imported when a model's first layer is built: this module is loaded in
every vLLM process, also of other models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import (
    QUANT_METHOD,
    CheckpointConfig,
    LayerScheme,
    check_agreement,
    matches,
)

# Of other methods, whose checkpoints are converted while they are loaded.
CONVERTIBLE = ("gptq", "awq", "auto-round", "compressed-tensors")
_GATES = ("gate", "shared_expert_gate", "router")
_USUAL_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class IntScaleConfig(QuantizationConfig):  # type: ignore[misc]
    """`CheckpointConfig` behind vLLM's interface."""

    def __init__(self, checkpoint: CheckpointConfig | None = None) -> None:
        """Without a checkpoint's config it is made from the model's files, which vLLM names later.

        So it is for a model without a quantization_config, and for one of another method.
        """
        super().__init__()
        from vllm_intscale.loading import LoadReport

        self.checkpoint = checkpoint or CheckpointConfig()
        self.live = checkpoint is None  # converted while it is loaded
        self.source: tuple[str, Path] | None = None  # its name and folder
        self.report = LoadReport()

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> IntScaleConfig:
        """From `quantization_config` of config.json; IntScaleError for an unknown key or value."""
        if config.get("quant_method") in CONVERTIBLE:  # see override_quantization_method
            return cls()
        return cls(CheckpointConfig.from_dict(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim intscale checkpoints, and others if the user wants that; vLLM asks about each.

        Raises IntScaleError if the user wants intscale for a method that cannot be converted.
        """
        found = hf_quant_cfg.get("quant_method")
        if found == QUANT_METHOD:
            return QUANT_METHOD if user_quant in (None, QUANT_METHOD) else None
        if user_quant == QUANT_METHOD:
            if found in CONVERTIBLE:
                return QUANT_METHOD
            raise IntScaleError(
                f"--quantization {QUANT_METHOD}: quant_method of the checkpoint is {found!r}; "
                f"unquantized models can be served, and {', '.join(CONVERTIBLE)} with int4 weights"
            )
        return None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Refuse a broken local checkpoint before any engine process starts (headers only).

        For a model that is to be converted, find out how.
        """
        if self.live:
            from vllm_intscale.quantize import plan_live

            plan = plan_live(model_name, revision)
            self.checkpoint, self.source = plan.config, (model_name, plan.folder)
            return
        folder = Path(model_name)
        if any(folder.glob("*.safetensors*")):  # the index, if all else is missing
            from vllm_intscale.checkpoint import validate_checkpoint

            validate_checkpoint(folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename layers to vLLM's names; `re:` patterns stay as they are."""

        def renamed(pattern: str) -> list[str]:
            if pattern.startswith("re:"):
                return [pattern]
            return list(hf_to_vllm_mapper.apply_list([pattern]))

        old = self.checkpoint
        self.checkpoint = replace(
            old,
            ignore=tuple(new for pattern in old.ignore for new in renamed(pattern)),
            overrides={new: f for pattern, f in old.overrides.items() for new in renamed(pattern)},
        )

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """The method of the layer with this full name; None if vLLM's default shall apply."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from vllm_intscale import fusion
        from vllm_intscale.linear import IntScaleLinearMethod
        from vllm_intscale.moe import IntScaleMoEMethod

        fusion.install()
        if self.source:
            from vllm_intscale.live import convert_while_loading

            convert_while_loading(*self.source)

        if isinstance(layer, LinearBase):
            if _is_router_gate(layer, prefix):
                return UnquantizedLinearMethod()
            if scheme := self._scheme_of(prefix, self._parts(prefix)):
                return IntScaleLinearMethod(scheme, prefix, self.report)
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            moe = layer.moe_config
            if scheme := self._scheme_of(prefix, _experts(layer, prefix)):
                return IntScaleMoEMethod(scheme, prefix, self.report, moe)
            return UnquantizedFusedMoEMethod(moe)
        return None

    def _scheme_of(self, prefix: str, parts: Iterable[str]) -> LayerScheme | None:
        scheme = check_agreement(prefix, map(self.checkpoint.scheme_of, parts))
        if scheme is None:
            self.report.ignored.add(prefix)
        return scheme

    def _parts(self, prefix: str) -> list[str]:
        """The checkpoint's names of the layers that are fused into this one.

        The usual ones if vLLM's model does not tell and the config does not know it by its own
        name, as it does where the checkpoint has it fused.
        """
        parent, dot, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name)
        if parts is None:
            known = (*self.checkpoint.ignore, *self.checkpoint.overrides)
            own = any(matches(pattern, prefix) for pattern in known)
            parts = [name] if own else _USUAL_PARTS.get(name, [name])
        return [parent + dot + part for part in parts]


def _experts(layer: Any, prefix: str) -> Iterable[str]:
    """The checkpoint's names of all projections of all routed experts of a layer."""
    projections = (layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name)
    for expert in range(layer.moe_config.num_logical_experts):
        for projection in filter(None, projections):
            yield f"{prefix}.{expert}.{projection}"


def _is_router_gate(layer: Any, prefix: str) -> bool:
    """Gates are never quantized, but some models of vLLM ask about theirs."""
    return type(layer).__name__ == "GateLinear" or prefix.rpartition(".")[2] in _GATES
