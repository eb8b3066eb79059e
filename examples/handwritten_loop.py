"""Add the metrics to a handwritten distillation loop; the lines marked with | do it."""

import copy

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from diagnostics.adapters.from_logits import from_logits  # |
from diagnostics.monitor import Monitor  # |

EOS, BUDGET, GROUP = 0, 16, 4
torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
teacher = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, initializer_range=0.5)).eval()
student = copy.deepcopy(teacher)
student.lm_head.weight.data += 0.3 * torch.randn_like(student.lm_head.weight)
student.generation_config.update(eos_token_id=EOS, pad_token_id=63)
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
monitor = Monitor()  # |

for step in range(20):
    prompts = torch.randint(1, 64, (8, 6)).repeat_interleave(GROUP, 0)
    attention_mask = torch.ones_like(prompts)
    ids = student.generate(
        prompts, attention_mask=attention_mask, do_sample=True, top_k=0, max_new_tokens=BUDGET
    )
    tokens = ids[:, prompts.shape[1] :]
    mask = (tokens == EOS).cumsum(1) - (tokens == EOS).long() == 0
    p_logits = student(ids).logits[:, prompts.shape[1] - 1 : -1]
    with torch.no_grad():
        q_logits = teacher(ids).logits[:, prompts.shape[1] - 1 : -1]
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    loss = (p.exp() * (p - q)).sum(-1)[mask].mean()

    batch = from_logits(  # |
        tokens,  # |
        mask,  # |
        p_logits,  # |
        q_logits,  # |
        prompt=torch.arange(8).repeat_interleave(GROUP),  # |
        ended=(tokens == EOS).any(1),  # |
    )  # |
    row = monitor(step, [batch.validate()], loss=loss.detach())  # |

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        names = ("loss", "divergence/reverse_kl", "divergence/reverse_kl_se", "consistency/z_H")
        print(f"step {step:2}", *(f"{name} {row[name]:.3f}" for name in names), sep="  ")
for name, reason in monitor.missing.items():
    print(f"not computed: {name} ({reason})")
