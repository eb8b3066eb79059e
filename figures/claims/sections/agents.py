"""Claims about agents."""

from figures.claims.claim import Claim
from figures.claims.measures import (
    more_games_won,
)

AGENTS = (
    Claim(
        "Agent and problems alternating: sampled tokens improve the agent (90.6 against 21.9)",
        "table 2",
        "agents",
        more_games_won("sampled", group="agents"),
    ),
    Claim(
        "Agent and problems alternating: local support improves the agent (95.3 against 21.9)",
        "table 2",
        "agents",
        more_games_won("lsm", group="agents"),
    ),
    Claim(
        "Agent and problems alternating: local support gives the better agent (95.3 against 90.6)",
        "table 2",
        "agents",
        more_games_won("lsm", "sampled", "agents"),
    ),
    Claim(
        "Agent and problems alternating: local support improves problems (41.7 against 28.2)",
        "table 2",
        "agents",
        more_games_won("lsm", group="agents", task="sort"),
    ),
    Claim(
        "Agent and problems alternating: local support beats sampled tokens on problems (41.7 "
        "against "
        "34.8)",
        "table 2",
        "agents",
        more_games_won("lsm", "sampled", "agents", "sort"),
    ),
)
