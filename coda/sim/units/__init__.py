"""Instructions of warps -> effects of a multiprocessor's units: memories, barriers, copy engines.

Methods that generated code calls share these arguments:

- `ins`: the `Instruction`, for errors and observers.
- `g`: rows of the warps in the register file, a slice or int array; `m`: active lanes, bool
  [warps, 32], None for all.
- Operands (`a`, `base`, `count`, `parity`, ...): [warps, 32], [warps, 1] or a scalar. An address is
  uint32 for shared and uint64 for global or generic memory, in bytes; the int `offset` is added. A
  *place* is a pair (address, offset).
- `then`: number of the block at which parked lanes continue.

They raise `Fault` for an illegal access or operation, `Unsupported` for one that is not modelled.
"""
