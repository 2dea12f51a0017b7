"""Methods decide: each looks at a model and its Tape and returns operations, plain data. One paper, one file."""
