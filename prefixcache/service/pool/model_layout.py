"""The layout of a model, read from its config.json.  No torch, no model code.

A pool has one layout: every layer keeps, for every token, keys and values of the same shape.  What
latent attention keeps, our kernels do not read: a slot of a page holds the latent of `kv_lora_rank`
numbers, and behind it the `qk_rope_head_dim` of the one key that is turned, in the format
`latent/RANK+ROPE/TYPE`.

```
read       heads of each kind of grouping (multi-head, grouped, multi-query), sliding windows (their
           tokens stay in the pool), the text model inside a multimodal one, layers that share the
           keys and values of earlier ones (not counted), latent attention (one plane a layer)
refused    by the name of the field: recurrent layers (a prefix of theirs is a state, not tokens),
           layers that differ, encoders, and every field about heads that says something else than
           what was derived
```
A field that is absent and one that is null are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Never

from prefixcache.bounded_files import read_file
from prefixcache.errors import InvalidRequest
from prefixcache.model_folders import places
from prefixcache.plain_json import json_text, once_each
from prefixcache.texts import escape
from prefixcache.types import DTYPE_BYTES, Layout, dtype_named
from prefixcache.user_folders import is_file, is_folder

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads")
_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "num_attention_groups",
    "n_kv_heads",
    "kv_n_heads",
    "multi_query_group_num",
    "num_query_groups",
    "num_key_value_heads_per_layer",
)
_HEAD_DIM = ("head_dim", "kv_channels", "attention_head_dim", "d_head", "d_kv")
_WIDTH = ("hidden_size", "n_embd", "d_model", "model_dim", "n_embed")
_TEXT_MODELS = ("text_config", "llm_config", "language_config", "thinker_config", "text_model")
_MULTI_QUERY = ("multi_query", "multi_query_attention")
_MULTI_QUERY_BY_DEFAULT = frozenset(("falcon", "RefinedWeb", "RefinedWebModel", "gpt_bigcode"))

_LAYER_KINDS = (
    "layer_types",
    "layers_block_type",
    "block_types",
    "_block_types",
    "hybrid_override_pattern",
    "attn_type_list",
    "layer_group_types",
)
"""Fields that say what each layer is."""
_ATTENTION = (
    *("attention", "full_attention", "sliding_attention", "chunked_attention", "self_attention"),
    *("global_attention", "local_attention", "global", "local", "full", "sliding", "*", "1"),
)
"""What these call a layer that keeps keys and values for each token."""
_OTHER_LAYER_KINDS = re.compile(
    r"(layer|block|mixer)s?_(types?|kinds?|patterns?)$|^attention_types$"
    r"|^(no_)?(self_)?att(entio)?n_(layers|layer_(idx|indices|ids)|idxs?|indices)$"
)
_NOT_OF_ATTENTION = re.compile(r"mlp|moe|ffn|expert|sparse|dense|rope|quant")
"""Kinds of layers that say nothing of what a layer keeps."""

_RECURRENT = re.compile(
    r"mamba|(^|_)(ssm|rwkv|lru|rnn|lstm|gla|kda)_|rwkv|delta_?net|^state_size$"
    r"|^conv_(kernel|L_cache|window)|^time_(mix|step)"
    r"|^linear_(attn|num|key|value|conv)|^full_att(entio)?n_(interval|idxs|layers)|^attn_layer_"
    r"|^hybrid_(layer|attention)|^(use_)?(recurrent|retention)|^shortconv|^mb_per_layer$"
)
"""Fields that only models with recurrent, convolutional or linear-attention layers have."""
_RECURRENT_MODELS = re.compile(
    r"mamba|rwkv|xlstm|retnet|recurrent_gemma|griffin|jamba|zamba|lfm2|transfo-xl"
)
_HYBRID_MODELS = re.compile(
    r"bamba|falcon_h1|granitemoehybrid|hymba|kimi_linear|minimax(_text_01|_m1)?$|nemotron_h|"
    r"olmo_hybrid|phi4flash|plamo2|qwen3_next|qwen3_5"
)
"""Models whose other layers are recurrent unless a field says what each layer is."""

_LATENT = ("kv_lora_rank", "use_mla", "kv_lora_dim")
_DIFFERING = (
    "block_configs",
    "cross_attention_layers",
    "use_cla",
    "global_head_dim",
    "attention_k_eq_v",
    "num_self_decoder_layers",
    "per_layer_config",
    "cross_layer_interval",
    "cross_attn_every_n_layers",
    "n_shared_head",
)
"""Fields of models whose layers do not all keep keys and values of one shape, of their own."""
_LOOK_AHEAD_MODELS = re.compile(
    r"llada|diffusion|^(dream|sdar)($|_)|paligemma|bidirec|^bidir_", re.IGNORECASE
)
"""Models of which all tokens of a stretch, or of the prompt, have a look at each other."""
_LOOK_AHEAD = (
    *("use_bidirectional_attention", "bidirectional_attention", "is_bidirectional"),
    *("bidirectional", "prefix_lm", "position_encoding_2d"),
)
"""Fields of the same; the last is that of the first ChatGLM."""
_CAUSAL = ("is_causal", "causal", "use_causal_mask", "causal_attention")
_OWN_HEAD_DIM = re.compile(
    r"^(gemma\w*|qwen3|qwen3_vl_text|glm4?|gpt_oss|seed_oss|helium|ernie4_5)$"
)
"""Models whose heads have, where it is not said, another width than their share of the layer's."""
_LATENT_MODELS = re.compile(r"^(deepseek_v(2|3|32)|kimi_k2|minicpm3|glm4_moe_lite)$")
"""Models with latent attention where nothing is said of it."""
_SEVERAL_A_LAYER = re.compile(r"longcat")
"""Models of which a layer attends more than once."""
_OF_SOME_LAYERS = re.compile(r"att(entio)?n|layer")
"""Fields that hold settings of their own for some of the layers."""
_ABOUT_HEADS = re.compile(
    r"head_(dim|size)s?$|(kv|key_value)_heads$|(kv|key_value)_heads_per_layer$"
)
_OTHER_QUERIES = re.compile(
    r"^num_\w+_(attention|query)_heads$|^(swa|sliding|global|local)_\w*heads$"
)
"""Of some layers: with other heads for queries, heads have another width."""
_KV_TYPE = re.compile(r"^kv_cache_(scheme|quant_algo|dtype)$")

_ENCODERS = ("is_encoder_decoder", "encoder_layers", "num_encoder_layers", "add_cross_attention")
"""Fields of models of which a part reads both ways."""
_ENCODER_MODELS = re.compile(
    r"^(albert|bart|bert|big_bird|bigbird_pegasus|blenderbot.*|camembert|canine|clip.*|convbert|"
    r"data2vec.*|deberta.*|distilbert|electra|ernie|esm|flaubert|fnet|funnel|ibert|layoutlm.*|led|"
    r"longformer|longt5|luke|m2m_100|marian|mbart|megatron-bert|mobilebert|modernbert|mpnet|mt5|"
    r"mvp|nezha|nllb.*|nystromformer|pegasus.*|prophetnet|reformer|rembert|roberta.*|roformer|"
    r"siglip.*|splinter|squeezebert|switch_transformers|t5.*|udop|umt5|vit.*|wav2vec2.*|whisper|"
    r"xlm|xlm-roberta.*|xlnet|xmod|yoso|.*bert|dinov\d.*|beit|deit|swin.*|wavlm|unispeech.*|new|gte|"
    r"mega|decision_transformer|tapas|lilt|bros|detr|owlvit|segformer|audio-spectrogram-transformer)$"
)

_MOST_BYTES = 16 * 2**20
_DEEPEST = 4


def read_layout(folder: Path, dtype: str | None = None, block_size: int | None = None) -> Layout:
    """Read the layout of the model in `folder`.

    Args:
        folder: Holds config.json; or the name of a model that is in a cache of this machine.
        dtype: Element type of the pool, if it is not the one that config.json names.
        block_size: Tokens of a page.  Without it, only what has a layout of our own format is read.

    Raises:
        InvalidRequest: there is no such file, it does not tell, or the model's keys and values have
            no uniform layout; the message names the field.
    """
    path = _find(folder) / "config.json"
    outer = _load(path)
    config = _Config(path, _text_model(path, outer))
    config.refuse_what_has_no_layout(outer)
    layers = config.layers()
    if latent := config.latent(block_size):
        rank, rope = latent
        named = _element_type(path, config.fields, outer, dtype)
        page_bytes = (block_size or 1) * (rank + rope) * DTYPE_BYTES[named]
        return Layout(planes=layers, page_bytes=page_bytes, format=f"latent/{rank}+{rope}/{named}")
    heads, kv_heads = config.heads(layers)
    head_dim = config.head_dim(heads)
    config.refuse_other_heads(heads, kv_heads, head_dim, layers)
    return Layout(layers, kv_heads, head_dim, _element_type(path, config.fields, outer, dtype))


def _element_type(
    path: Path, fields: Mapping[str, Any], outer: Mapping[str, Any], dtype: str | None
) -> str:
    named = dtype or _dtype(path, fields) or _dtype(path, outer) or "float32"
    try:
        name = dtype_named(named)
    except InvalidRequest:
        raise InvalidRequest(
            f"{path} names the type {_shown(named)}; a pool holds {', '.join(DTYPE_BYTES)}: "
            "give --dtype"
        ) from None
    if dtype is None:
        for field, value in (*_kv_types(fields, _DEEPEST), *_kv_types(outer, _DEEPEST)):
            raise InvalidRequest(
                f"{path}: {field} is {_shown(value)}: keys and values may be of another type than "
                f"{name}; give --dtype"
            )
    if dtype is None and DTYPE_BYTES[name] == 1:
        raise InvalidRequest(
            f"{path} names the type {_shown(named)}: weights of eight bits do not say that keys "
            "and values are; give --dtype"
        )
    return name


def _kv_types(fields: Mapping[str, Any], deepest: int) -> Iterable[tuple[str, Any]]:
    """Find what is said of the type of keys and values, also inside of what is said of weights."""
    for name, value in fields.items():
        if _KV_TYPE.search(name) and value not in (None, "", "auto", {}):
            yield name, value
        inner = isinstance(value, dict) and ("quant" in name or name == "compression_config")
        if inner and deepest:
            yield from _kv_types(value, deepest - 1)


def _find(folder: Path) -> Path:
    if is_file(folder / "config.json"):
        return folder
    try:
        known = [one for one in places(str(folder)) if (one / "config.json").is_file()]
    except (OSError, InvalidRequest):
        known = []
    if known:
        return known[0]
    if not is_folder(folder) and not folder.is_absolute():
        raise InvalidRequest(
            f"there is no folder {escape(str(folder))}, and no model of that name in a cache of "
            "this machine; give its folder, or --layout instead"
        )
    return folder


class _Config:
    """The fields of one text model."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def refuse_what_has_no_layout(self, outer: Mapping[str, Any]) -> None:
        """Refuse, by the field that tells, models that keep something else than keys and values."""
        for fields in (outer, self.fields):
            for name in _ENCODERS:
                if fields.get(name):
                    self._refuse(fields, name, "an encoder's part is no prefix")
            kind = fields.get("model_type")
            if isinstance(kind, str) and _RECURRENT_MODELS.search(kind):
                self._refuse(fields, "model_type", "its layers keep a state, not tokens")
        named = self.fields if self.fields.get("model_type") else outer
        kind = named.get("model_type")
        if isinstance(kind, str) and _ENCODER_MODELS.match(kind) and not self._is_decoder(outer):
            self._refuse(named, "model_type", "an encoder reads both ways: no prefix is final")
        if (
            isinstance(kind, str)
            and _HYBRID_MODELS.search(kind)
            and not any(self.fields.get(name) for name in _LAYER_KINDS)
        ):
            self._refuse(
                named, "model_type", "some of its layers keep a state, and which is not said"
            )
        for fields in (outer, self.fields):
            if fields.get("_class_name"):
                self._refuse(fields, "_class_name", "no language model is called so")
            kind = fields.get("model_type")
            if isinstance(kind, str) and _LOOK_AHEAD_MODELS.search(kind):
                self._refuse(fields, "model_type", "tokens look ahead: no prefix is final")
            if isinstance(kind, str) and _SEVERAL_A_LAYER.search(kind):
                self._refuse(fields, "model_type", "each of its layers attends more than once")
        for name in _LOOK_AHEAD:
            if self.fields.get(name):  # also "all": of which tokens
                self._refuse(self.fields, name, "tokens look ahead: no prefix is final")
        for name in _CAUSAL:
            if self.fields.get(name) not in (None, True):
                self._refuse(self.fields, name, "tokens look ahead: no prefix is final")
        if "bidirectional" in str(self.fields.get("attn_type")):
            self._refuse(self.fields, "attn_type", "tokens look ahead: no prefix is final")
        for name in _DIFFERING:
            if self.fields.get(name):
                self._refuse(self.fields, name, "its layers keep different shapes")
        self._refuse_recurrent_layers()

    def layers(self) -> int:
        """Count the layers that keep keys and values of their own."""
        layers = self._number(_LAYERS)
        if layers is None:
            self._missing(_LAYERS)
        shared = self._number(("num_kv_shared_layers",), least=0) or 0
        if shared >= layers:
            self._refuse(self.fields, "num_kv_shared_layers", f"there are {layers} layers in all")
        return layers - shared

    def latent(self, block_size: int | None) -> tuple[int, int] | None:
        """Give the width of the latent and of the key that is turned, in latent attention."""
        name = next((name for name in _LATENT if self.fields.get(name)), None)
        if name is not None and (block_size is None or name != "kv_lora_rank"):
            self._refuse(self.fields, name, "latent attention keeps one plane, not keys and values")
        for other in self.fields:
            if other.startswith("index_") and self.fields[other]:
                kept = "keys and values" if name is None else "the latents"
                self._refuse(self.fields, other, f"its layers keep an index beside {kept}")
        kind = self.fields.get("model_type")
        is_latent = isinstance(kind, str) and _LATENT_MODELS.match(kind)
        if is_latent and self.fields.keys().isdisjoint(_LATENT):
            self._refuse(self.fields, "model_type", "kv_lora_rank is missing")
        if name is None:
            return None
        rank, rope = self._number(("kv_lora_rank",)), self._number(("qk_rope_head_dim",))
        if rank is None or rope is None:
            self._missing(("qk_rope_head_dim",))
        return rank, rope

    def heads(self, layers: int) -> tuple[int | None, int]:
        """Give how many heads queries have, if that is said, and how many keys and values."""
        heads = self._number(_HEADS, layers=layers)
        kv_heads = self._number(_KV_HEADS, layers=layers)
        if self.fields.get("model_type") in ("falcon", "RefinedWebModel"):
            if not self.fields.get("new_decoder_architecture"):
                kv_heads = None  # Falcon's older models look at `multi_query` alone
            elif kv_heads is None:
                kv_heads = heads  # and its newer ones do not look at it
        if kv_heads is None:
            kv_heads = 1 if self._is_multi_query() else heads
        elif self.fields.get("multi_query_attention") is False:
            kv_heads = heads  # ChatGLM: the number of groups counts only if there are groups
        if kv_heads is None:
            self._missing((*_KV_HEADS[:1], *_HEADS))
        if heads is not None and heads % kv_heads:
            raise InvalidRequest(
                f"{self.path}: {heads} heads cannot share {kv_heads} heads of keys and values "
                f"evenly; give --layout instead"
            )
        return heads, kv_heads

    def head_dim(self, heads: int | None) -> int:
        """Give the width of a head."""
        stated = self._number(_HEAD_DIM)
        if stated is not None:
            return stated
        kind = self.fields.get("model_type")
        if isinstance(kind, str) and _OWN_HEAD_DIM.match(kind):
            self._refuse(self.fields, "model_type", "its heads' width is its own: head_dim misses")
        if heads is None:
            self._missing((*_HEAD_DIM[:1], *_HEADS))
        width = self._number(_WIDTH)
        if width is None:
            self._missing((*_HEAD_DIM[:1], *_WIDTH))
        if width % heads:
            raise InvalidRequest(
                f"{self.path}: a width of {width} does not divide among {heads} heads, and "
                f"there is no head_dim; give --layout instead"
            )
        return width // heads

    def refuse_other_heads(
        self, heads: int | None, kv_heads: int, head_dim: int, layers: int
    ) -> None:
        """Refuse a field about heads that was not read, and says something else."""
        for name, value in self.fields.items():
            if value is None or name in _HEADS:
                continue
            if not _ABOUT_HEADS.search(name):
                if _OTHER_QUERIES.search(name) and value != heads:
                    self._refuse(self.fields, name, f"{heads} for all layers was derived")
                continue
            is_width = name.endswith(("dim", "size", "dims", "sizes"))
            derived = head_dim if is_width else kv_heads
            read = name in _HEAD_DIM or name in _KV_HEADS
            if not read and value not in (derived, [derived] * layers):
                self._refuse(self.fields, name, f"{derived} for all layers was derived")
        for name, value in self.fields.items():
            if not isinstance(value, dict) or not _OF_SOME_LAYERS.search(name):
                continue
            said = [value[one] for one in _KV_HEADS if value.get(one) is not None]
            widths = [value[one] for one in _HEAD_DIM if value.get(one) is not None]
            if any(one != kv_heads for one in said) or any(one != head_dim for one in widths):
                self._refuse(self.fields, name, "its layers keep different shapes")

    def _is_decoder(self, outer: Mapping[str, Any]) -> bool:
        classes = outer.get("architectures") or self.fields.get("architectures")
        classes = classes if isinstance(classes, list) else [classes]
        flag = self.fields.get("is_decoder", False)
        if not isinstance(flag, bool | None):
            self._refuse(self.fields, "is_decoder", "true or false is expected")
        return bool(flag) or any(
            isinstance(name, str) and name.endswith("ForCausalLM") for name in classes
        )

    def _is_multi_query(self) -> bool:
        for name in _MULTI_QUERY:
            value = self.fields.get(name)
            if value is not None:
                if not isinstance(value, bool):
                    self._refuse(self.fields, name, "true or false is expected")
                return value
        if self.fields.get("attn_type") == "multiquery_attention":
            return True
        kind = self.fields.get("model_type")
        return isinstance(kind, str) and kind in _MULTI_QUERY_BY_DEFAULT

    def _refuse_recurrent_layers(self) -> None:
        for name in _LAYER_KINDS:
            kinds = self.fields.get(name)
            if kinds is None:
                continue
            if not isinstance(kinds, str if name == "hybrid_override_pattern" else list):
                self._refuse(self.fields, name, "the kind of each layer is expected")
            odd = [str(kind) for kind in kinds if str(kind) not in _ATTENTION]
            if odd:
                self._refuse(
                    self.fields,
                    name,
                    f"{len(odd)} layers are {_shown(odd[0])}: they keep no keys and values of each "
                    "token, so that a prefix of theirs is not in the pool",
                )
            layers = self._number(_LAYERS)
            if name == "layer_types" and layers is not None and len(kinds) < layers:
                self._refuse(self.fields, name, f"{len(kinds)} kinds, for {layers} layers")
        for name, value in self.fields.items():
            if name not in _LAYER_KINDS and isinstance(value, list) and value:
                self._refuse_other_kinds(name, value)
            if value and _RECURRENT.search(name) and not isinstance(value, str):
                self._refuse(
                    self.fields, name, "recurrent layers keep a state, not tokens, of a prefix"
                )

    def _refuse_other_kinds(self, name: str, kinds: list[Any]) -> None:
        """Refuse what says by another name which layers are attention, if not all are."""
        if not _OTHER_LAYER_KINDS.search(name) or _NOT_OF_ATTENTION.search(name):
            return
        flat = list(_flat(kinds, _DEEPEST))
        told = [str(kind) for kind in flat if not isinstance(kind, int)]
        if told:
            is_odd = any(kind not in _ATTENTION for kind in told)
        else:  # numbers of layers
            every = set(range(self._number(_LAYERS) or 0))
            is_odd = set(flat) != every or name.startswith("no_")
        if is_odd:
            self._refuse(self.fields, name, "not all of its layers keep keys and values")

    def _number(
        self, names: Iterable[str], *, least: int = 1, layers: int | None = None
    ) -> int | None:
        """Give the number that stands under one of `names`; None where none of them is there.

        Args:
            names: Synonyms: those that are there must agree.
            least: The least number that makes sense.
            layers: Where given, a list with one number for each layer will do, if all are equal.
        """
        found: dict[str, int] = {}
        for name in names:
            value = self.fields.get(name)
            if value is None:
                continue
            if layers is not None and isinstance(value, list):
                if not value or any(one != value[0] for one in value):
                    self._refuse(self.fields, name, "its layers keep different shapes")
                if len(value) not in (layers, self._number(_LAYERS)):
                    self._refuse(self.fields, name, f"{len(value)} numbers, for {layers} layers")
                value = value[0]
            if not isinstance(value, int) or isinstance(value, bool):
                self._refuse(self.fields, name, "a whole number is expected")
            if not least <= value < 2**20:
                self._refuse(self.fields, name, f"{least} or more is expected, below 2^20")
            found[name] = value
        if len(set(found.values())) > 1:
            said = " and ".join(f"{name}={value}" for name, value in found.items())
            raise InvalidRequest(f"{self.path} contradicts itself: {said}; give --layout instead")
        return next(iter(found.values()), None)

    def _missing(self, names: Iterable[str]) -> Never:
        raise InvalidRequest(f"{self.path} has none of {', '.join(names)}; give --layout instead")

    def _refuse(self, fields: Mapping[str, Any], name: str, why: str) -> Never:
        shown = _shown(fields[name])
        raise InvalidRequest(
            f"{self.path}: {escape(name[:60])} is {shown}: {why}; give --layout instead"
        )


def _flat(values: list[Any], deepest: int) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list) and deepest:
            yield from _flat(value, deepest - 1)
        else:
            yield value


def _shown(value: Any) -> str:
    """Write what a field holds, in ASCII and in few characters."""
    shown = json_text(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _load(path: Path) -> dict[str, Any]:
    try:
        data = read_file(path, _MOST_BYTES)
    except InvalidRequest as error:
        raise InvalidRequest(f"{error}; give --layout instead") from None
    try:
        config = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once_each)
    except RecursionError:
        raise InvalidRequest(f"{path} is nested too deeply for a configuration") from None
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidRequest(
            f"{path} is not the configuration of a model, but {type(config).__name__}"
        )
    return config


def _text_model(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Give the fields of the text model, which may stand inside those of a multimodal one."""
    while (name := next((one for one in _TEXT_MODELS if config.get(one) is not None), "")) != "":
        inner = config[name]
        other = next((one for one in _TEXT_MODELS if config.get(one) not in (None, inner)), None)
        if other is not None:
            raise InvalidRequest(
                f"{path}: {name} and {other} are two text models; give --layout instead"
            )
        if not isinstance(inner, dict) or not inner:
            raise InvalidRequest(
                f"{path}: {name} tells nothing of the text model; give --layout instead"
            )
        config = inner
    attention = config.get("attn_config")  # MPT, DBRX: what is about attention stands apart
    return {**attention, **config} if isinstance(attention, dict) else config


def _dtype(path: Path, config: Mapping[str, Any]) -> str:
    named = {one: config[one] for one in ("dtype", "torch_dtype") if config.get(one)}
    if not all(isinstance(one, str) for one in named.values()):
        raise InvalidRequest(f"{path}: dtype is no name of a type; give --dtype")
    types = {one.removeprefix("torch.") for one in named.values()}
    if len(types) > 1:
        said = " and ".join(f"{name}={_shown(value)}" for name, value in named.items())
        raise InvalidRequest(f"{path} contradicts itself: {said}; give --dtype")
    return next(iter(types), "")
