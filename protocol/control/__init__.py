"""The control protocol, sans-IO: msgpack-RPC between `cleavectl` (or any program) and the daemon.

Frames are msgpack arrays, self-delimiting on the stream: request ``[0, id, method, params]``,
response ``[1, id, error, result]``, notification ``[2, method, params]``. ``params`` is a map of
named parameters (or an array that holds one such map, which is what generic msgpack-RPC clients can
send). The first call is ``hello``; ``rpc.list`` describes all methods.
"""
