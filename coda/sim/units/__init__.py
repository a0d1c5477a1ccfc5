"""The units of a multiprocessor: registers, memories, barriers, copy engines."""
