"""A pass over the graphs that vLLM compiles: what is quantized is quantized where it is made.

    vllm_ir.rms_norm, vllm_ir.fused_add_rms_norm -> quantize_activation     norm_quantize
    vllm.all_reduce -> norm_quantize                                all_reduce_norm_quantize
    silu(gate) * up, as Inductor decomposes it   -> quantize_activation     silu_mul_quantize

And of queries and keys that are parts of one tensor, which Inductor would rotate in a kernel each:

    their rotary embeddings, as it decomposes them                          rotary_embedding

Anything else stays as it is, and so does a norm of other sizes or dtypes than `norm_quantize` has.
Where a norm's residual is itself a sum of this graph, `norm_quantize` gets what that is the sum of:
Inductor would compute it so, in float32, and nobody has to store that sum.

Sums over tensor-parallel ranks are this package's where vLLM has its custom all-reduce, to which
they are bit-identical where that adds up all ranks at once; `all_reduce` says of which size.
"""

from __future__ import annotations

import operator
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, Ignored, KeywordArg, Match
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode, get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_intscale import all_reduce, ops
from vllm_intscale.all_reduce import MAX_RANKS
from vllm_intscale.compile_cache import code_digest
from vllm_intscale.errors import IntScaleError
from vllm_intscale.row_kernels import MAX_ADDENDS, MAX_NORM_K, MAX_ROW_BYTES

logger = init_logger("vllm.intscale")
aten, prims = torch.ops.aten, torch.ops.prims
QUANTIZE, NORM_QUANTIZE = ops.quantize_activation.default, ops.norm_quantize.default


def install() -> None:
    """Add the pass to the engine that is being built, if it compiles its model.

    Raises IntScaleError for a wrong INTSCALE_FUSE.
    """
    if not (config := _compiling()):
        return
    compilation = config.compilation_config
    passes = compilation.inductor_compile_config
    found = passes.setdefault(current_platform.pass_key, QuantizeWhereMade())
    if not isinstance(found, QuantizeWhereMade):
        logger.warning_once("intscale: another pass over compiled graphs is set, ours is not")
    elif compilation.pass_config.fuse_allreduce_rms and _group_to_connect(config):
        compilation.pass_config.fuse_allreduce_rms = False  # comes first, and does not quantize
        logger.info_once(
            "intscale: fuse_allreduce_rms is turned off: norms quantize what they make"
        )


def connect_ranks() -> None:
    """Have tensor-parallel ranks exchange what their sums need, if those are to be fused.

    All ranks call this, when their model is loaded.
    """
    if not (config := _compiling()) or config.parallel_config.tensor_parallel_size == 1:
        return
    if group := _group_to_connect(config):
        columns, dtype = config.model_config.get_hidden_size(), config.model_config.dtype
        all_reduce.connect(group.unique_name, group.cpu_group, columns, dtype, group.device)
        logger.info_once("intscale: sums over %d ranks can be fused with norms", group.world_size)
    else:
        logger.info_once("intscale: sums over ranks are vLLM's")


def _group_to_connect(config: Any) -> Any:
    """The group of tensor-parallel ranks, if all of them reach each other's memory."""
    group, columns = get_tp_group(), config.model_config.get_hidden_size()
    custom = getattr(group.device_communicator, "ca_comm", None)
    if custom is None or custom.disabled or getattr(custom, "mnnvl_only", False):
        return None
    usable = group.world_size <= MAX_RANKS and columns % 8 == 0 and 0 < columns <= MAX_NORM_K
    return group if usable else None


def _compiling() -> Any:
    """The config of the engine that is being built, if it compiles its model and we are to fuse."""
    config = get_current_vllm_config_or_none()
    fuse = os.environ.get("INTSCALE_FUSE", "1")
    if fuse not in ("0", "1"):
        raise IntScaleError(f"INTSCALE_FUSE is {fuse!r}; it must be 0 or 1")
    if config is None or fuse == "0":
        return None
    return config if config.compilation_config.mode not in (None, CompilationMode.NONE) else None


class QuantizeWhereMade(InductorPass):  # type: ignore[misc]
    """See above."""

    def __call__(self, graph: Graph) -> None:
        quantized = dict.fromkeys(n.args[0] for n in graph.nodes if n.target is QUANTIZE)
        sums: list[Node] = []
        norms = sum(_fuse_norm(graph, made, sums) for made in quantized)
        for added in sums:
            if not added.users:
                _forget_sum(added)
        order = {node: i for i, node in enumerate(graph.nodes)}
        found = [node for node in order if node.target is NORM_QUANTIZE]
        over_ranks = sum(_fuse_all_reduce(graph, norm, order) for norm in found)
        products = sum(_fuse_silu_mul(graph, made) for made in quantized)
        logger.info_once(
            "intscale: %d of %d inputs of layers are quantized by the norm before them, %d by "
            "silu(gate) * up; %d sums over ranks are fused, %d rotary embeddings",
            *(norms, len(quantized), products, over_ranks, _fuse_rotary_embeddings(graph)),
        )

    def uuid(self) -> str:
        """Changes with this package, and so does what is cached of compiled graphs."""
        return code_digest()


def _fuse_norm(graph: Graph, made: Any, sums: list[Node]) -> bool:
    """Whether `made` is a norm, which now quantizes what it makes.

    sums: those that such norms store; this one is added.
    """
    norm: Any = made
    addends: list[Node] = []
    if made.target is operator.getitem and made.args[1] == 0:
        norm = made.args[0]
    if _is(norm, torch.ops.vllm_ir.fused_add_rms_norm):
        x, residual, weight, epsilon, *size = norm.args
        addends = _addends(residual, sums)
    elif norm is made and _is(norm, torch.ops.vllm_ir.rms_norm):
        x, weight, epsilon, *size = norm.args
    else:
        return False
    value = x.meta["val"]
    if weight is None or any(s is not None for s in (*size, *norm.kwargs.values())):
        return False
    if value.dim() != 2 or value.shape[1] % 8 or value.shape[1] > MAX_NORM_K:
        return False
    if any(other.meta["val"].dtype != value.dtype for other in (*addends, weight)):
        return False
    keep_norm = any(user.target is not QUANTIZE for user in made.users)
    args = ([*addends, x], weight, epsilon, keep_norm, bool(addends))
    a8, token_scale, y, added = _insert(graph, norm, NORM_QUANTIZE, args)
    _replace_quantized(graph, made, a8, token_scale)
    if addends:
        sums.append(added)
        for user in list(norm.users):
            user.replace_all_uses_with(y if user.args[1] == 0 else added)
            graph.erase_node(user)
    elif keep_norm:
        made.replace_all_uses_with(y)
    graph.erase_node(norm)  # it is a user of its residual
    return True


def _addends(node: Any, sums: list[Node]) -> list[Node]:
    """What a node is the sum of, if that is known and one more can be added, otherwise itself."""
    found: list[Any] = list(node.args[0].args[0]) if node in sums else []
    if node.target is operator.getitem and node.args[1] == 1:
        norm = node.args[0]
        if _is(norm, torch.ops.vllm_ir.fused_add_rms_norm):
            found = [*_addends(norm.args[1], sums), norm.args[0]]
    alike = all(addend.meta["val"].dtype == node.meta["val"].dtype for addend in found)
    return found if alike and 0 < len(found) < MAX_ADDENDS else [node]


def _forget_sum(added: Any) -> None:
    """Have the norm not store it."""
    norm = added.args[0]
    norm.args = (*norm.args[:-1], False)
    norm.meta["val"] = (*norm.meta["val"][:-1], norm.meta["val"][-1].new_empty(0))
    added.meta["val"] = norm.meta["val"][-1]


def _fuse_all_reduce(graph: Graph, norm: Any, order: Mapping[Node, int]) -> bool:
    """Whether a `norm_quantize` can be the first to need what its last addend is a sum of over
    ranks; then it adds that up.
    """
    others: list[Any] = list(norm.args[0])
    reduced = others.pop()
    if not _is(reduced, torch.ops.vllm.all_reduce) or reduced in others:
        return False
    if any(order.get(user, -1) < order[norm] for user in reduced.users):
        return False
    part, group_name = list(reduced.args) + list(reduced.kwargs.values())
    args = ([*others, part], *norm.args[1:], group_name)
    *results, total = _insert(graph, norm, ops.all_reduce_norm_quantize.default, args)
    for result in list(norm.users):
        result.replace_all_uses_with(results[result.args[1]])
        graph.erase_node(result)
    graph.erase_node(norm)
    reduced.replace_all_uses_with(total)
    graph.erase_node(reduced)
    return True


def _fuse_silu_mul(graph: Graph, made: Any) -> bool:
    """Whether `made` is silu(gate) * up of one tensor, which is now quantized at once."""
    if not _is(made, aten.mul) or any(user.target is not QUANTIZE for user in made.users):
        return False
    silu, up = map(_unconverted, made.args)
    gate = _unconverted(silu.args[0]) if _is(silu, aten.div) else None
    if gate is None or not _is(gate, aten.slice) or not _is(up, aten.slice):
        return False
    (gate_up, *gate_range), (other, *up_range) = gate.args, up.args
    if gate_up is not other or not _is_one_plus_exp_of_minus(silu.args[1], silu.args[0]):
        return False
    value = gate_up.meta["val"]
    k = value.shape[-1] // 2
    if gate_range != [1, 0, k] or up_range[:2] != [1, k] or up_range[2] < 2 * k:
        return False
    if value.dim() != 2 or value.shape[1] != 2 * k or k % 8 or 2 * k > MAX_ROW_BYTES:
        return False
    if value.dtype != made.meta["val"].dtype:
        return False
    results = _insert(graph, made, ops.silu_mul_quantize.default, (gate_up,))
    _replace_quantized(graph, made, *results)
    return True


def _is_one_plus_exp_of_minus(node: Any, x: Any) -> bool:
    if not _is(node, aten.add) or node.args[1] != 1 or not _is(node.args[0], aten.exp):
        return False
    minus = node.args[0].args[0]
    return _is(minus, aten.neg) and minus.args[0] is x


def _fuse_rotary_embeddings(graph: Graph) -> int:
    """How often queries and keys, the first two parts of one tensor, are rotated at once now."""
    found: defaultdict[tuple[Any, ...], dict[int, Match]] = defaultdict(dict)
    for node in graph.nodes:
        match = ROTATION.match(node)
        if isinstance(match, Match) and _can_rotate(**match.kwargs):
            of = tuple(match.kwargs[name] for name in ("split", "positions", "cos_sin_cache"))
            found[of][match.kwargs["part"]] = match
    fused = [parts for parts in found.values() if parts.keys() >= {0, 1}]
    for parts in fused:
        _rotate(graph, parts[0], parts[1], before=next(iter(parts.values())).output_node())
    return len(fused)


def _rotation_pattern() -> CallFunction:
    """What vLLM's RotaryEmbedding.forward_static becomes where all columns of a head rotate."""

    def halves(whole: CallFunction) -> list[CallFunction]:
        split = CallFunction(aten.split.Tensor, whole, KeywordArg("half"), -1, _users=MULTIPLE)
        return [CallFunction(operator.getitem, split, i, _users=MULTIPLE) for i in (0, 1)]

    def product(*factors: CallFunction) -> CallFunction:
        return CallFunction(aten.mul.Tensor, *factors)

    part = CallFunction(operator.getitem, KeywordArg("split"), KeywordArg("part"))
    shape = [Ignored(), Ignored(), KeywordArg("head_size")]
    first, second = halves(CallFunction(aten.reshape.default, part, shape))
    angles = aten.index.Tensor, KeywordArg("cos_sin_cache"), [KeywordArg("positions")]
    cos, sin = (
        CallFunction(aten.unsqueeze.default, half, -2, _users=MULTIPLE)
        for half in halves(CallFunction(*angles, _users=MULTIPLE))
    )
    rotated = [
        CallFunction(aten.sub.Tensor, product(first, cos), product(second, sin)),
        CallFunction(aten.add.Tensor, product(second, cos), product(first, sin)),
    ]
    return CallFunction(aten.cat.default, rotated, -1, _users=MULTIPLE)


ROTATION = _rotation_pattern()


def _can_rotate(
    split: Any, part: int, head_size: Any, half: Any, positions: Any, cos_sin_cache: Any
) -> bool:
    """Whether `rotary_embedding` takes them. It reads positions and their angles early, so that
    they must be there before anything of this graph runs.
    """
    if not positions.op == cos_sin_cache.op == "placeholder":
        return False
    if not _is(split, aten.split_with_sizes) or positions.meta["val"].dtype != torch.int64:
        return False
    angles: Any = cos_sin_cache.meta["val"]
    dims = [node.meta["val"].dim() for node in (split.args[0], positions, cos_sin_cache)]
    return dims == [2, 1, 2] and angles.shape[1] == head_size == 2 * half and not head_size % 16


def _rotate(graph: Graph, queries: Match, keys: Match, before: Node) -> None:
    """Rotate both there."""
    of = queries.kwargs
    qkv, sizes, *_ = of["split"].args
    heads = [size // of["head_size"] for size in sizes[:2]]
    args = (qkv, of["positions"], of["cos_sin_cache"], *heads)
    results = _insert(graph, before, ops.rotary_embedding.default, args)
    for result, match in zip(results, (queries, keys), strict=True):
        match.output_node().replace_all_uses_with(result)
        graph.erase_node(match.output_node())


def _is(node: Any, packet: Any) -> bool:
    """Whether it calls any overload of an operator."""
    target = node.target if isinstance(node, Node) else None
    return getattr(target, "overloadpacket", None) is packet


def _unconverted(node: Any) -> Any:
    """What a conversion between floating-point types converts."""
    return node.args[0] if _is(node, prims.convert_element_type) else node


def _insert(graph: Graph, before: Node, target: Any, args: Sequence[Any]) -> list[Node]:
    """Call an operator there; the nodes of its results."""
    values = map_arg(tuple(args), lambda node: node.meta["val"])
    fake_mode = detect_fake_mode(values)
    assert fake_mode
    with fake_mode, graph.inserting_before(before):
        call = graph.call_function(target, tuple(args))
        call.meta["val"] = target(*values)
        results = [
            graph.call_function(operator.getitem, (call, i)) for i in range(len(call.meta["val"]))
        ]
    for result, value in zip(results, call.meta["val"], strict=True):
        result.meta["val"] = value
    return results


def _replace_quantized(graph: Graph, made: Any, a8: Node, token_scale: Node) -> None:
    """Use these results instead of those of all quantizations of `made`."""
    for quantization in [user for user in made.users if user.target is QUANTIZE]:
        for result in list(quantization.users):
            result.replace_all_uses_with(a8 if result.args[1] == 0 else token_scale)
            graph.erase_node(result)
        graph.erase_node(quantization)
