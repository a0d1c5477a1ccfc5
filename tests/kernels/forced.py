"""Programs whose GEMMs have given configs."""

from dataclasses import replace

from coda.kernels.gemm.configs import case_of, deepened, refused
from coda.kernels.gemm.mainloop import gemms
from coda.kernels.gemm.stages import need
from coda.lowering.configure import size_partials


def with_configs(program, given):
    """A Program with these configs, by the name of the kernel."""
    configs = {k.name: given.get(k.name, k.config) for k in program.kernels}
    kernels = tuple(replace(k, config=configs[k.name]) for k in program.kernels)
    return size_partials(replace(program, kernels=kernels))


def forced(program, config):
    """A Program whose GEMMs have this config, where it is legal, with the depths that it needs."""
    target, given = program.target, {}
    for kernel in gemms(program):
        case = case_of(program, kernel)
        if refused(case, config, target) is None:
            needed = need(case.demand, case.work.problem[1], config, target)
            given[kernel.name] = deepened(needed, config, target)[0]
    return with_configs(program, given)
