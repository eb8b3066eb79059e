"""Register a verl loss mode for every objective when verl imports this module.

    VERL_USE_EXTERNAL_MODULES=opd.integrations.verl.register python -m verl.trainer.main_ppo ...

Modes for which verl lacks data are registered too; they raise an explanation when a run is
configured. For an objective with options write a module of your own that verl loads beside this
one:

    from opd.integrations.verl.losses import register
    register("sampled_token", mode="half", gamma=0.5)
"""

from opd.integrations.verl.losses import register, register_unsupported
from opd.objectives.catalogue import OBJECTIVES

for name in OBJECTIVES:
    try:
        register(name)
    except ValueError as error:
        register_unsupported(name, str(error))
