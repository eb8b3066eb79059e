"""Losses with known verdicts, in many styles, written from what public reports describe.

None of them uses code of `opd`: a loss stands for somebody else's. The verdicts follow the table of
faults of `opd audit`, read literally, and were written down before an audit saw the loss.
"""
