"""Methods decide what to do with a model: each reads a Tape and returns operations, plain data. One file per paper."""
