"""verl loads this module: importing it registers a loss mode for each of our objectives.

    VERL_USE_EXTERNAL_MODULES=opd.integrations.verl.register python -m verl.trainer.main_ppo ...

Modes that verl cannot supply are registered too, to say what is missing when a run is configured.
For an objective with choices write a module of your own that verl loads beside this one:

    from opd.integrations.verl.losses import register
    register("sampled_token", mode="half", gamma=0.5)
"""

from opd.integrations.verl.losses import refuse, register
from opd.objectives.factory import OBJECTIVES

for name in OBJECTIVES:
    try:
        register(name)
    except ValueError as error:
        refuse(name, str(error))
