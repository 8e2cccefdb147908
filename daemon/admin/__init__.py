"""`cleavectl`, the admin client: a blocking client of the control socket, commands, and what they
print.

Its start-up time counts (scripts call it hundreds of times): nothing here imports asyncio, numpy or
storage, and rich is imported only where a progress bar is drawn.
"""
