"""Single operations that torch computes, since no kernel of coda's does."""
