"""Write the examples in tests/diagnostics/formats/examples with the other tools' own classes.

python -m tests.helpers.dumps.write_dumps vllm     # in an environment with vLLM 0.32
python -m tests.helpers.dumps.write_dumps verl     # with verl 0.9.1
python -m tests.helpers.dumps.write_dumps slime PATH/slime/utils/types.py
"""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.dumps.dump_arrays import Sampled, sampled_responses

FOLDER = Path(__file__).parents[2] / "diagnostics" / "formats" / "examples"
TOP_K = 3


def write_lines(name: str, rows: list[Any]) -> None:
    (FOLDER / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def to_plain(value: Any) -> Any:
    """Return dictionaries and lists for objects, as a user of the engine would dump them."""
    if isinstance(value, list):
        return [to_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def write_vllm() -> None:
    import torch
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionLogProb,
        ChatCompletionLogProbs,
        ChatCompletionLogProbsContent,
        ChatCompletionResponse,
        ChatCompletionResponseChoice,
        ChatMessage,
    )
    from vllm.entrypoints.serve.engine.protocol import UsageInfo
    from vllm.logprobs import append_logprobs_for_next_position, create_sample_logprobs
    from vllm.outputs import CompletionOutput, RequestOutput

    def logprobs(logp: np.ndarray, tokens: list[int], flat: bool) -> Any:
        container = create_sample_logprobs(flat)
        for p, token in zip(logp, tokens, strict=True):
            top = torch.tensor(p).topk(TOP_K)
            rank = int((p >= p[token]).sum())
            append_logprobs_for_next_position(
                container,
                [token, *top.indices.tolist()],
                [float(p[token]), *top.values.tolist()],
                [f"<{token}>"] * (TOP_K + 1),
                rank,
                TOP_K,
            )
        return container

    def output(i: int, r: Sampled, flat: bool) -> CompletionOutput:
        return CompletionOutput(
            index=i,
            text="text",
            token_ids=r.tokens,
            cumulative_logprob=sum(r.student_logp),
            logprobs=logprobs(r.student, r.tokens, flat),
            finish_reason="stop" if r.ended else "length",
        )

    responses = sampled_responses(tools=False)
    for name, is_flat in (("vllm.jsonl", False), ("vllm_flat.jsonl", True)):
        requests = []
        for i in range(0, len(responses), 2):
            group = responses[i : i + 2]
            prompt_logprobs = [
                None,
                *logprobs(group[0].prompt_student[1:], group[0].prompt[1:], False),
            ]
            requests.append(
                RequestOutput(
                    request_id=str(i),
                    prompt="text",
                    prompt_token_ids=group[0].prompt,
                    prompt_logprobs=prompt_logprobs,
                    outputs=[output(j, r, is_flat) for j, r in enumerate(group)],
                    finished=True,
                )
            )
        write_lines(name, [to_plain(vars(x)) for x in requests])
    scored = []
    for i, r in enumerate(responses):
        sequence = r.prompt + r.tokens
        logp = np.concatenate([r.prompt_student, r.teacher])
        positions = [None, *logprobs(logp[1:], sequence[1:], False)]
        request = RequestOutput(str(i), "text", sequence, positions, [], True)
        scored.append(to_plain(vars(request)) | {"response_length": len(r.tokens)})
    write_lines("vllm_scored.jsonl", scored)

    def entry(kind: Any, p: np.ndarray, token: int, **others: Any) -> Any:
        text = f"t{token} "
        return kind(token=text, logprob=float(p[token]), bytes=[*text.encode()], **others)

    answers = []
    for r in responses:
        content = []
        for p, token in zip(r.student, r.tokens, strict=True):
            top = [entry(ChatCompletionLogProb, p, int(k)) for k in np.argsort(-p)[:TOP_K]]
            content.append(entry(ChatCompletionLogProbsContent, p, token, top_logprobs=top))
        choice = ChatCompletionResponseChoice(
            index=0,
            message=ChatMessage(role="assistant", content="text"),
            logprobs=ChatCompletionLogProbs(content=content),
            finish_reason="stop" if r.ended else "length",
        )
        usage = UsageInfo(prompt_tokens=len(r.prompt), completion_tokens=len(r.tokens))
        answer = ChatCompletionResponse(model="m", choices=[choice], usage=usage)
        request = [{"role": "user", "content": str(r.prompt)}]
        answers.append(json.loads(answer.model_dump_json()) | {"messages": request})
    write_lines("openai_chat.jsonl", answers)


def padded_batch(responses: list[Sampled]) -> dict[str, np.ndarray]:
    """Return verl's arrays: prompts padded on the left, responses on the right with noise."""
    num, p = len(responses), max(len(r.prompt) for r in responses)
    t = max(len(r.tokens) for r in responses)
    batch: dict[str, Any] = {
        "prompts": np.zeros((num, p), dtype=np.int64),
        "responses": np.zeros((num, t), dtype=np.int64),
        "attention_mask": np.zeros((num, p + t), dtype=np.int64),
        "response_mask": np.zeros((num, t), dtype=np.int64),
        "old_log_probs": np.full((num, t), -7.0, dtype=np.float32),
        "rollout_log_probs": np.full((num, t), -7.0, dtype=np.float32),
        "teacher_logprobs": np.full((num, p + t, 1), -7.0, dtype=np.float32),
        "teacher_ids": np.zeros((num, p + t, 1), dtype=np.int32),
        "token_level_scores": np.zeros((num, t), dtype=np.float32),
    }
    for i, r in enumerate(responses):
        n, size = len(r.prompt), len(r.tokens)
        batch["prompts"][i, p - n :] = r.prompt
        batch["responses"][i, :size] = r.tokens
        batch["attention_mask"][i, p - n : p + size] = 1
        batch["response_mask"][i, :size] = r.loss
        batch["old_log_probs"][i, :size] = r.student_logp
        batch["rollout_log_probs"][i, :size] = r.student_logp
        batch["teacher_logprobs"][i, p - 1 : p + size - 1, 0] = r.teacher_logp
        batch["teacher_ids"][i, p - 1 : p + size - 1, 0] = r.tokens
        batch["token_level_scores"][i, size - 1] = r.reward
    return batch


def write_verl() -> None:
    import torch
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    responses = sampled_responses()
    tensors = {name: torch.from_numpy(x) for name, x in padded_batch(responses).items()}
    uid = np.array([str(r.prompt) for r in responses], dtype=object)
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": uid})
    data.save_to_disk(FOLDER / "verl_dataproto.pt")
    torch.save(data, FOLDER / "verl_torch_save.pt")
    torch.save({**data.batch, **data.non_tensor_batch}, FOLDER / "verl_tensors.pt")
    texts = ["2 3 1", "5 4"]
    RayPPOTrainer._write_generations(
        texts, ["1 2 3", "4 5"], ["x", "y"], [1.0, 0.0], {"acc": [1.0, 0.0]}, str(FOLDER), 1
    )
    (FOLDER / "1.jsonl").rename(FOLDER / "verl_text.jsonl")


def write_slime(types_file: str) -> None:
    import torch

    kinds = runpy.run_path(types_file)
    sample_type = kinds["Sample"]
    samples = []
    for i, r in enumerate(sampled_responses()):
        status = sample_type.Status.COMPLETED if r.ended else sample_type.Status.TRUNCATED
        sample = sample_type(
            group_index=i // 2,
            index=i,
            prompt="text",
            tokens=r.prompt + r.tokens,
            response="text",
            response_length=len(r.tokens),
            reward=r.reward,
            loss_mask=r.loss,
            rollout_log_probs=r.student_logp,
            teacher_log_probs=r.teacher_logp,
            status=status,
        )
        samples.append(sample.to_dict())
    write_lines("slime.jsonl", samples)
    torch.save({"rollout_id": 0, "samples": samples}, FOLDER / "slime.pt")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    {"vllm": write_vllm, "verl": write_verl, "slime": write_slime}[sys.argv[1]](*sys.argv[2:])
