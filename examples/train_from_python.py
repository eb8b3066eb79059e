"""Train with an optimizer and a loop of your own; `opd lab --tiny` builds the toy pair in seconds.

python examples/train_from_python.py
"""

import torch

from opd import ScoreRequest, load_pair, make_objective, policy_loss, sample, score_batch

my_questions = [["2+3=", "7+6="], ["4+4=", "9+1="]]

pair = load_pair("lab-tiny/student", "lab-tiny/teacher")
objective = make_objective("teacher_topk")
request = ScoreRequest(requirements=objective.requirements)
optimizer = torch.optim.AdamW(pair.student.network.parameters(), lr=1e-3)
for questions in my_questions:
    prompts, rollouts = sample(pair, questions, max_response=12, group_size=2)
    batch = score_batch(pair.student, pair.teacher, prompts, rollouts, request)
    policy_loss(pair.student, batch, objective).backward()
    optimizer.step()
    optimizer.zero_grad()
