"""W4A8 with Integer Scale for vLLM: a quantization plugin and the tool that makes checkpoints."""

import logging

__version__ = "0.1.0"


def register() -> None:
    """Entry point of the group `vllm.general_plugins`: make `intscale` known to vLLM.

    vLLM calls it in every one of its processes, whatever the model. Hence it may be called again,
    imports nothing that touches a GPU and never raises: other models must be served regardless.
    """
    try:
        from vllm.model_executor.layers.quantization import (
            QUANTIZATION_METHODS,
            register_quantization_config,
        )

        from vllm_intscale.plugin import IntScaleConfig

        if IntScaleConfig.get_name() not in QUANTIZATION_METHODS:
            register_quantization_config(IntScaleConfig.get_name())(IntScaleConfig)
    except Exception as error:
        logging.getLogger("vllm.intscale").warning(
            "intscale: not available in this vLLM, its checkpoints cannot be served: %r", error
        )
