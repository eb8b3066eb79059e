"""Names of the estimators as figures print them: the field's words instead of catalogue keys."""

NAMES = {
    "plain": "sampled reverse KL",
    "kl_advantage": "KL as advantage",
    "leave_one_out": "leave-one-out baseline",
    "local_kl": "local-KL baseline",
    "optimal": "optimal baseline",
    "position_value": "position baseline",
    "value": "value baseline",
    "rb_immediate": "mean immediate cost",
    "rb_future": "mean future costs",
    "rb_all": "mean costs",
    "rb_all_value": "mean costs, value baseline",
    "full_reverse_kl": "full reverse KL",
}
"""The printed name of each estimator that is not a top-k form or one of k1, k2 and k3."""


def estimator_name(key: str) -> str:
    """Return an estimator's printed name; a top-k form names its support first."""
    if key in NAMES:
        return NAMES[key]
    support, topk, form = key.partition("_topk")
    if not topk:
        return key.replace("_", " ")
    return f"{support} top-k" + (f", {form[1:].replace('_', ' ')}" if form else "")
