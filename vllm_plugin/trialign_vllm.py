"""vLLM plugin that registers Baichuan's config and model.

    pip install ./vllm_plugin          # in vLLM's environment
    vllm serve FOLDER                  # exported by launch/export_hf.py, or as published

vLLM calls `register` in each of its processes, by the entry point group vllm.general_plugins.
"""

from transformers import AutoConfig, PretrainedConfig


class BaichuanConfig(PretrainedConfig):
    """Config of Baichuan 1 and 2, 7B and 13B (https://arxiv.org/abs/2309.10305).

    At module level because vLLM pickles it to its engine process.

    Args:
        alibi: ALiBi instead of rotary embeddings. None: decided as in models/families/baichuan.py: the published 13B
            models have no max_position_embeddings, and hidden_size 5120.
        norm_head: normalized head. None: decided by vocab_size and Baichuan2's key z_loss_weight.

    Raises:
        ValueError: a config.json without these keys that fits none of the published models.
    """

    model_type = "baichuan"

    def __init__(
        self,
        vocab_size: int = 64000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        hidden_act: str = "silu",
        max_position_embeddings: int | None = None,
        model_max_length: int = 4096,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        alibi: bool | None = None,
        norm_head: bool | None = None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        # transformers builds a config without `architectures` for its defaults.
        architectures = kwargs.get("architectures") or ()
        is_7b = max_position_embeddings is not None or "BaiChuanForCausalLM" in architectures
        if architectures and alibi is None and hidden_size == (5120 if is_7b else 4096):
            raise ValueError(
                f"hidden_size={hidden_size}, max_position_embeddings={max_position_embeddings} with {architectures[0]}:"
                " neither a 7B nor a 13B as published; set the key alibi to true or false in config.json"
            )
        z_loss = kwargs.get("z_loss_weight")
        is_2 = vocab_size == 125696 or z_loss is not None
        if architectures and norm_head is None and (vocab_size == 64000) == is_2:
            raise ValueError(
                f"vocab_size={vocab_size}, z_loss_weight={z_loss}: neither Baichuan (64000) nor Baichuan2 (125696,"
                " z_loss_weight); set the key norm_head to true or false in config.json"
            )
        self.alibi = not is_7b if alibi is None else alibi
        self.norm_head = is_2 if norm_head is None else norm_head
        self.max_position_embeddings = max_position_embeddings or model_max_length
        self.model_max_length = model_max_length
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)


def register() -> None:
    """Registers config and model; may be called more than once in a process."""
    from vllm import ModelRegistry  # vLLM imports this module while it loads its plugins

    AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
    for architecture in ("BaichuanForCausalLM", "BaiChuanForCausalLM"):
        # By name: importing the model's module would initialize devices in a process that must not do so.
        ModelRegistry.register_model(architecture, "trialign_vllm_baichuan:BaichuanForCausalLM")
