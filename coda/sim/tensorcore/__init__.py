"""The tensor cores of sm_90a and sm_100a, and tensor memory."""
