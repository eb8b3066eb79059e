"""Monitor an unmodified TRL trainer; needs `pip install trl datasets` and two models.

    python examples/attach_trl.py STUDENT TEACHER    # folders or hub names; one vocabulary

`opd lab --tiny` builds a toy pair in seconds: lab-tiny/student and lab-tiny/teacher. After the run,
`opd report runs/trl` writes an HTML report of the metrics.
"""

import sys

import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from diagnostics.adapters.trl import observe_trl
from diagnostics.alarms.alarms import Alarms
from diagnostics.monitor import Monitor
from diagnostics.records.sinks import to_file

if len(sys.argv) != 3:
    sys.exit("usage: python examples/attach_trl.py STUDENT TEACHER")
trainer = DistillationTrainer(
    model=sys.argv[1],
    teacher_model=sys.argv[2],
    args=DistillationConfig(
        "runs/trl",
        max_steps=10,
        max_completion_length=64,
        logging_steps=5,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"{i}+{i + 1}="}]} for i in range(64)]
    ),
)

monitor = Monitor(interval=2, sinks=[to_file("runs/trl/panel.jsonl")], alarms=Alarms())
with observe_trl(trainer, monitor) as rows:
    trainer.train()  # TRL's log includes the metrics

metric_names = ("step", "divergence/reverse_kl", "divergence/reverse_kl_se", "consistency/z_H")
for row in rows:
    print("  ".join(f"{name} {row[name]:.3g}" for name in metric_names))
for name, reason in monitor.missing.items():
    print(f"not computed: {name} ({reason})")
