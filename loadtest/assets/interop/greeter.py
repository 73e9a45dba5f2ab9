"""A gRPC server without code generation: bytes in, bytes out."""
import time
from concurrent import futures

import grpc


def unary(request, context):
    context.set_trailing_metadata((("x-seen", "unary"),))
    return b"hello " + request


def counting(request, context):
    for number in range(int(request)):
        yield str(number).encode()
    context.set_trailing_metadata((("x-seen", "counting"),))


def chatting(requests, context):
    for request in requests:
        yield b"you said " + request


def failing(request, context):
    context.set_trailing_metadata((("x-seen", "failing"),))
    context.abort(grpc.StatusCode.NOT_FOUND, "no such thing: ä")


def sleeping(request, context):
    time.sleep(30)
    return b""


class Handler(grpc.GenericRpcHandler):
    def service(self, call):
        return {
            "/test.Greeter/Unary": grpc.unary_unary_rpc_method_handler(unary),
            "/test.Greeter/Counting": grpc.unary_stream_rpc_method_handler(counting),
            "/test.Greeter/Chatting": grpc.stream_stream_rpc_method_handler(chatting),
            "/test.Greeter/Failing": grpc.unary_unary_rpc_method_handler(failing),
            "/test.Greeter/Sleeping": grpc.unary_unary_rpc_method_handler(sleeping),
        }.get(call.method)


server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
server.add_generic_rpc_handlers((Handler(),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print("listening", port, flush=True)
server.wait_for_termination()
