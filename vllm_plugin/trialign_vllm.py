"""What vLLM calls in each of its processes before it looks at a model: makes Baichuan known to it.

    pip install ./vllm_plugin          # where vLLM is installed
    vllm serve FOLDER                  # as trialign's export_hf.py wrote it, or the published one

vLLM finds `register` by the entry point group vllm.general_plugins.
"""

from transformers import AutoConfig, PretrainedConfig


class BaichuanConfig(PretrainedConfig):
    """Baichuan 1 and 2, 7B and 13B (https://arxiv.org/abs/2309.10305), as their config.json writes them.

    At module level because vLLM pickles it to its engine process.

    Args:
        alibi: ALiBi instead of rotary positions. None goes by what tells the published ones apart (models/families/
            baichuan.py has the table): the 13B models name no max_position_embeddings, and their hidden_size is 5120.
        norm_head: the head's rows are normalized. None goes by the vocabulary and Baichuan2's key z_loss_weight.

    Raises:
        ValueError: a config.json that says neither and is like none of those published.
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
        named = kwargs.get("architectures") or ()  # none: not of a config.json, transformers makes one for its defaults
        seven, thirteen = max_position_embeddings is not None, max_position_embeddings is None
        if "BaiChuanForCausalLM" in named:
            seven, thirteen = True, False
        if named and alibi is None and (hidden_size == 5120 if seven else hidden_size == 4096):
            raise ValueError(
                f"hidden_size={hidden_size}, max_position_embeddings={max_position_embeddings} with {named[0]}: neither"
                " a 7B nor a 13B as published; say in config.json which by alibi: true or false"
            )
        second = kwargs.get("z_loss_weight") is not None
        if named and norm_head is None and (vocab_size == 64000) == (vocab_size == 125696 or second):
            raise ValueError(
                f"vocab_size={vocab_size}, z_loss_weight={kwargs.get('z_loss_weight')}: neither Baichuan (64000) nor"
                " Baichuan2 (125696, z_loss_weight); say in config.json which by norm_head: true or false"
            )
        self.alibi = thirteen if alibi is None else alibi
        self.norm_head = vocab_size == 125696 or second if norm_head is None else norm_head
        self.max_position_embeddings = max_position_embeddings or model_max_length
        self.model_max_length = model_max_length
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)


def register() -> None:
    """Makes config and model known; vLLM may call it more than once in a process."""
    from vllm import ModelRegistry

    AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
    for architecture in ("BaichuanForCausalLM", "BaiChuanForCausalLM"):
        # By name: importing the model's module would set up devices in a process that must not do so.
        ModelRegistry.register_model(architecture, "trialign_vllm_baichuan:BaichuanForCausalLM")
