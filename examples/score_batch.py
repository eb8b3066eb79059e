"""Score responses with both models and print the panel; `opd lab --tiny` builds the toy pair.

python examples/score_batch.py
"""

from diagnostics import Monitor
from opd import ScoreRequest, load_pair, sample, score_batch

my_questions = ["2+3=", "7+6=", "4+4=", "9+1="]

pair = load_pair("lab-tiny/student", "lab-tiny/teacher")
request = ScoreRequest(eos_map=pair.eos_map)
prompts, rollouts = sample(pair, my_questions, max_response=12, group_size=2)
batch = score_batch(pair.student, pair.teacher, prompts, rollouts, request)
row = Monitor()(0, [batch.scored])
for name, value in row.items():
    print(f"{name:50} {value:.4g}")
