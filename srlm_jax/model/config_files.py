"""A model's configuration as it stands beside its weights: Hugging Face's config.json, Meta's params.json, or the
manifest of a checkpoint of this package.

Every field of a file is checked. A field that changes the logits is an error unless it says what a Llama does. So is a
field that is unknown here, unless it is off: null, false or empty. Its model could differ slightly from the one built.
"""

import dataclasses
import json
from collections.abc import Mapping

from etils import epath

from srlm_jax.model.config import LlamaConfig, RopeScaling
from srlm_jax.model.folders import MARKS, BadModelFile, layout_of, listed, read_json
from srlm_jax.storage import jsonl
from srlm_jax.text.tokenizer import load_tokenizer


def _off(value: object) -> bool:
    """Whether a field of this value asks for nothing: null, false or empty. A zero does not count: it may be a factor
    or a position."""
    return value is None or value is False or value in ("", [], {})


@dataclasses.dataclass(frozen=True)
class _Fields:
    """The fields of an object in a file, read by type."""

    where: str
    document: Mapping[str, object]

    def positive(self, name: str, kind: type[int] | type[float]) -> int | float:
        """A number above 0; a whole number does for a float."""
        value = self.document.get(name)
        if type(value) is not int and not (kind is float and type(value) is float):
            wanted = "a number" if kind is float else "a whole number"
            raise BadModelFile(f"{self.where}: {name} must be {wanted}, not {value!r:.60}")
        if not 0 < value < 2**63:  # beyond that it may be no float, nor the size of anything
            raise BadModelFile(f"{self.where}: {name} must be more than 0 and less than 2^63, not {value!r:.60}")
        return kind(value)

    def optional(self, name: str, kind: type[int] | type[float], otherwise: float) -> int | float:
        """As `positive`, but `otherwise` where the field is missing or null."""
        return otherwise if self.document.get(name) is None else self.positive(name, kind)

    def flag(self, name: str) -> bool:
        """A truth value; False where the field is missing or null."""
        value = self.document.get(name)
        if value is not None and type(value) is not bool:
            raise BadModelFile(f"{self.where}: {name} must be true or false, not {value!r:.60}")
        return bool(value)

    def only(self, values: Mapping[str, tuple]) -> None:
        """Raises unless each of these fields is missing or holds one of its values."""
        for name, allowed in values.items():
            if name in self.document and self.document[name] not in allowed:
                raise BadModelFile(
                    f"{self.where}: {name} is {self.document[name]!r:.60}, which is another model than the Llama built "
                    f"here; it can only be {' or '.join(json.dumps(value) for value in allowed)}"
                )

    def no_others(self, known: frozenset[str]) -> None:
        """Raises where there is a field that is neither `known` nor off (null, false or empty)."""
        if unknown := sorted(name for name in self.document.keys() - known if not _off(self.document[name])):
            raise BadModelFile(
                f"{self.where}: unknown field {listed(unknown, ', ')}: it may change what the model computes; remove "
                "it only if you know that it does not"
            )

    def build(self, **fields: object) -> LlamaConfig:
        try:
            return LlamaConfig(**fields)
        except ValueError as error:
            raise BadModelFile(f"{self.where}: {error}") from error


# --- Hugging Face -----------------------------------------------------------------------------------------------------

_HF_SIZES = {
    "vocab_size": "V",
    "hidden_size": "D",
    "num_hidden_layers": "L",
    "num_attention_heads": "N",
    "num_key_value_heads": "K",
    "head_dim": "H",
    "intermediate_size": "F",
}
_HF_READ = frozenset(_HF_SIZES) | {
    "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"
}  # fmt: skip

# Each changes the logits unless it holds one of these values.
_HF_ONLY = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    # What relatives of Llama have, and a Llama with their fields has in its own measure.
    "logit_scale": (1.0, None),
    "logits_scaling": (1.0, None),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    # A Llama has these: false would take something away.
    "is_causal": (True, None),
    "use_rope": (True, None),
    "scale_attn_weights": (True, None),
}

# Carried from one config.json to another.
_HF_CARRIED = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")

# These say where the file comes from, how to train, how to sample, how to split the work or what to return. None
# changes the logits: `pretraining_tp` cuts a matrix product into parts, and their sum is the same product.
_HF_HARMLESS = frozenset(_HF_CARRIED) | {
    "architectures", "attention_dropout", "attn_implementation", "attn_pdrop", "bad_words_ids", "begin_suppress_tokens",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dtype", "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "is_decoder", "is_llama_config",
    "label2id", "length_penalty", "max_length", "max_sequence_length", "min_length", "model_max_length",
    "neftune_noise_alpha", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "prefix", "pretraining_tp", "problem_type",
    "remove_invalid_values", "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "use_bfloat16", "use_cache", "use_flash_attention", "vocab_file",
}  # fmt: skip

# Beginnings of names that programs give to notes of their own: transformers' private fields (_name_or_path,
# _attn_implementation), Unsloth's (unsloth_fixed, unsloth_version).
_HF_NOTES = ("_", "unsloth_")


def _check_hf(fields: _Fields) -> None:
    """Raises where a config.json describes another model, or one that is kept in a form that is not read."""
    fields.only(_HF_ONLY)
    document, where = fields.document, fields.where
    if quantized := document.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        raise BadModelFile(
            f"{where}: quantization_config: the weights are quantized ({method or 'method unknown'!s:.40}), which is "
            "not read; give the folder of the model before it was quantized"
        )
    code = document.get("auto_map") or {}
    if not isinstance(code, Mapping) or any(name.startswith("AutoModel") for name in code):
        raise BadModelFile(
            f"{where}: auto_map: the model is computed by code in its folder, which is never run; remove the field "
            "only if you know that this code computes a Llama"
        )
    notes = {name for name in document if name.startswith(_HF_NOTES)}
    fields.no_others(_HF_READ | _HF_ONLY.keys() | _HF_HARMLESS | notes | {"auto_map", "quantization_config"})


def from_hf(
    document: Mapping[str, object], where: str, *, param_dtype: str, compute_dtype: str, remat: str
) -> LlamaConfig:
    """The model that a config.json of transformers 4 or 5 describes.

    Raises:
      BadModelFile: a field is missing, mistyped, unknown, or says that the model is another one than ours.
    """
    fields = _Fields(where, document)
    _check_hf(fields)
    D, N = fields.positive("hidden_size", int), fields.positive("num_attention_heads", int)
    if document.get("head_dim") is None and D % N:
        raise BadModelFile(f"{where}: hidden_size {D} is no multiple of num_attention_heads {N}; give head_dim")
    theta, scaling = _rope(fields)
    return fields.build(
        V=fields.positive("vocab_size", int),
        D=D,
        L=fields.positive("num_hidden_layers", int),
        N=N,
        K=fields.optional("num_key_value_heads", int, N),
        H=fields.optional("head_dim", int, D // N),
        F=fields.positive("intermediate_size", int),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.positive("rms_norm_eps", float),
        tied=fields.flag("tie_word_embeddings"),
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        remat=remat,
    )


_ROPE_FIELDS = frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    given = [name for name in ("rope_scaling", "rope_parameters") if fields.document.get(name) is not None]
    if len(given) == 2 and fields.document[given[0]] != fields.document[given[1]]:
        raise BadModelFile(f"{fields.where}: rope_scaling and rope_parameters contradict each other")
    where = f"{fields.where}: {given[0]}" if given else fields.where
    table = fields.document[given[0]] if given else {}
    if not isinstance(table, Mapping):
        raise BadModelFile(f"{where} must hold fields or null, not {table!r:.60}")
    rope = _Fields(where, table)
    theta = rope.optional("rope_theta", float, fields.optional("rope_theta", float, 10_000.0))
    if theta != fields.optional("rope_theta", float, theta):
        raise BadModelFile(f"{where}: rope_theta is {theta}, and {fields.document['rope_theta']} outside of it")
    kinds = ("default", "llama3")
    rope.only({"rope_type": kinds, "type": kinds, "partial_rotary_factor": (1.0, None)})
    kind = table.get("rope_type", table.get("type", "default"))
    if kind != table.get("type", kind):
        raise BadModelFile(f"{where}: rope_type and type contradict each other")
    known = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    if kind == "default":
        rope.no_others(known)
        return theta, None
    rope.no_others(known | _ROPE_FIELDS)
    try:
        return theta, RopeScaling(
            factor=rope.positive("factor", float),
            low_freq_factor=rope.positive("low_freq_factor", float),
            high_freq_factor=rope.positive("high_freq_factor", float),
            original_context=rope.positive("original_max_position_embeddings", int),
        )
    except BadModelFile:
        raise
    except ValueError as error:
        raise BadModelFile(f"{where}: {error}") from error


def to_hf(config: LlamaConfig, carried: Mapping[str, object]) -> dict[str, object]:
    """A config.json for the model, with the fields of `hf_fields` in it.

    The rotary angles are spelt as transformers 4 does it: 5 reads that too, where 4 would pass over the new spelling in
    silence and take its defaults.
    """
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for theirs, ours in _HF_SIZES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.param_dtype,
        **carried,
    }


def hf_fields(folder: epath.Path) -> dict[str, object]:
    """What a config.json says beyond `LlamaConfig`, as far as this folder knows it: context length, special tokens."""
    layout = layout_of(folder)
    document = read_json(folder / MARKS[layout])
    if layout == "hf":
        return {name: document[name] for name in _HF_CARRIED if name in document}
    if layout == "native" and isinstance(document.get("hf"), dict):
        return {name: document["hf"][name] for name in _HF_CARRIED if name in document["hf"]}
    known = {} if document.get("max_seq_len") is None else {"max_position_embeddings": document["max_seq_len"]}
    try:
        tokenizer = load_tokenizer(folder)
    except (FileNotFoundError, ValueError):  # there is none, or none that can be read
        return known | {"bos_token_id": None, "eos_token_id": None}
    first, *others = tokenizer.ends
    return known | {"bos_token_id": tokenizer.bos, "eos_token_id": [first, *others] if others else first}


def generation_config(carried: Mapping[str, object]) -> dict[str, object]:
    """A generation_config.json for a model that came without one."""
    special = {name: carried[name] for name in _HF_CARRIED[1:] if carried.get(name) is not None}
    return {"_from_model_config": True, **special}


# --- Meta -------------------------------------------------------------------------------------------------------------

_META_READ = frozenset(
    {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
) | {"rope_theta", "use_scaled_rope"}  # fmt: skip
_META_HARMLESS = frozenset({"max_seq_len", "max_batch_size"})

# What `use_scaled_rope` stands for, as published for Llama 3.1 and 3.3 (8B, 70B, 405B); params.json does not hold it.
_META_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
# Llama 3.2's two text models (1B, 3B) have a factor of their own. Width and layers tell them.
_META_FACTORS = {(2048, 16): 32.0, (3072, 28): 32.0}


def from_meta(
    document: Mapping[str, object],
    where: str,
    *,
    vocabulary: int,
    tied: bool,
    param_dtype: str,
    compute_dtype: str,
    remat: str,
) -> LlamaConfig:
    """The model that a params.json describes; its weights tell `vocabulary`, often -1 in the file, and `tied`.

    Raises:
      BadModelFile: a field is missing, mistyped or unknown, or contradicts the weights.
    """
    fields = _Fields(where, document)
    fields.no_others(_META_READ | _META_HARMLESS)
    if document.get("vocab_size", -1) not in (-1, vocabulary):
        raise BadModelFile(f"{where}: vocab_size is {document['vocab_size']!r:.60}, and the weights have {vocabulary}")
    D, L, N = (fields.positive(name, int) for name in ("dim", "n_layers", "n_heads"))
    if D % N:
        raise BadModelFile(f"{where}: dim {D} is no multiple of n_heads {N}")
    # Two thirds of four times the width, as the gated MLP has three matrices instead of two (Shazeer 2020).
    width = int(fields.optional("ffn_dim_multiplier", float, 1.0) * int(2 * 4 * D / 3))
    multiple = fields.positive("multiple_of", int)
    scaling = dataclasses.replace(_META_SCALING, factor=_META_FACTORS.get((D, L), _META_SCALING.factor))
    return fields.build(
        V=vocabulary,
        D=D,
        L=L,
        N=N,
        K=fields.optional("n_kv_heads", int, N),
        H=D // N,
        F=-(-width // multiple) * multiple,
        rope_theta=fields.optional("rope_theta", float, 10_000.0),
        rope_scaling=scaling if fields.flag("use_scaled_rope") else None,
        norm_eps=fields.positive("norm_eps", float),
        tied=tied,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        remat=remat,
    )


# --- ours -------------------------------------------------------------------------------------------------------------


def from_manifest(
    document: Mapping[str, object], where: str, *, param_dtype: str, compute_dtype: str, remat: str
) -> LlamaConfig:
    """The model that the manifest of a checkpoint describes.

    Raises:
      BadModelFile: it holds no configuration of a model.
      BadRecord: a field is missing, mistyped or unknown.
    """
    if not isinstance(document.get("config"), dict):
        raise BadModelFile(f"{where} lacks the field 'config': it is no checkpoint of a model of this package")
    # A checkpoint written before there was a scaling has no field for it.
    chosen = {"param_dtype": param_dtype, "compute_dtype": compute_dtype, "remat": remat}
    fields = {"rope_scaling": None} | document["config"] | chosen
    return jsonl.decode(f"{where}: config", fields, LlamaConfig, "copy the checkpoint again")
