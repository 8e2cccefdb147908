"""iSCSI (RFC 7143), target and initiator, sans-IO.

A daemon makes one `node.TargetNode` over its `node.TargetDirectory`, and one
`connection.TargetConnection` for each TCP connection; `initiator.InitiatorConnection` is the other
side. Bytes go in through ``get_buffer`` and ``buffer_updated``, out through the ``send`` given at
construction; time comes in through ``tick``.
"""
