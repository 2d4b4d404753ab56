"""Stop tokens: found in the model folder, printed, and removed from the response text."""

import json

from scripts import options, succeed
from tiny import tiny_chat_model
from trialign.algorithms.roles.build import build_decoder
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.mesh import build_mesh
from trialign.models.families.registry import read_config
from trialign.models.hf.tokenizer import read_tokenizer


def test_tokenizer_eos_is_a_stop_token(tmp_path):
    """Where neither config.json nor generation_config.json has one."""
    model, tokenizer = tmp_path / "model", read_tokenizer(tiny_chat_model(tmp_path / "model", tied=False))
    prompt = tokenizer("<s>user: say</s><s>assistant: ", add_special_tokens=False)["input_ids"]
    decoder = build_decoder(str(model), read_config(model), build_mesh(), "float32")
    greedy = SamplingParams(temperature=0.0, max_new_tokens=8)
    (response,) = EmbeddedGenerator(decoder, decoder.mesh).generate([prompt], [0], greedy)
    length = next(n for n in range(1, 8) if response.tokens[n] not in response.tokens[:n])  # its first occurrence
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(response.tokens[length])
    tokenizer.save_pretrained(model)
    values = json.loads((model / "config.json").read_text()) | {"eos_token_id": None}
    (model / "config.json").write_text(json.dumps(values))
    (model / "generation_config.json").unlink()
    (tmp_path / "p.jsonl").write_text('{"prompt": "say"}\n')
    given = options(
        model_path=model, model_dtype="float32", data_sources=tmp_path / "p.jsonl", run_output=tmp_path / "run",
        data_max_prompt_tokens=96, rollout_temperature=1e-4, rollout_max_new_tokens=8,
    )  # fmt: skip
    output = succeed("evaluate", *given)
    assert f"stop tokens: {tokenizer.eos_token} ({response.tokens[length]})" in output
    (line,) = map(json.loads, (tmp_path / "run" / "completions.jsonl").read_text().splitlines())
    assert (line["finish"], line["tokens"]) == ("stop", length + 1)
    assert line["completion"] == tokenizer.decode(response.tokens[:length], skip_special_tokens=True)
