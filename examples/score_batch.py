"""Score responses with both models and print the panel; `opd lab --tiny` builds the toy pair.

python examples/score_batch.py
"""

from diagnostics import Monitor
from opd import ScoreRequest, load_pair, make_objective, sample, score_batch

my_questions = ["2+3=", "7+6=", "4+4=", "9+1="]

pair = load_pair("lab-tiny/student", "lab-tiny/teacher")
objective = make_objective("teacher_topk", support_k=8)
request = ScoreRequest(requirements=objective.requirements)
prompts, rollouts = sample(pair, my_questions, max_response=12, group_size=2)
batch = score_batch(pair.student, pair.teacher, prompts, rollouts, request)
row = Monitor()(0, [batch.scored])
for name, value in row.items():
    print(f"{name:50} {value:.4g}")
