"""Models and adapters are made one at a time."""

import threading

# While a model is made, transformers changes torch's default dtype and accelerate the methods of
# nn.Module, for all threads. An adapter that another thread made at that moment would be in another
# dtype, or without values. What is made inside draws nothing from the random generators that a run
# in another thread draws its dropout from.
MAKING = threading.RLock()
