"""A gRPC client: PORT [CA]. Prints what it got."""
import queue
import sys

import grpc


def main(port, ca=None):
    if ca:
        with open(ca, "rb") as file:
            named = (("grpc.ssl_target_name_override", "bench.test"),)
            channel = grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(file.read()), named)
    else:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    with channel:
        unary = channel.unary_unary("/test.Greeter/Unary")
        answer, call = unary.with_call(b"you", timeout=20)
        print("unary", answer.decode(), call.code().name, dict(call.trailing_metadata())["x-seen"])

        answer, call = unary.with_call(b"x" * 3_000_000, timeout=20)
        print("large", len(answer), call.code().name)

        call = channel.unary_stream("/test.Greeter/Counting")(b"1000", timeout=20)
        numbers = [int(part) for part in call]
        seen = dict(call.trailing_metadata())["x-seen"]
        print("server streaming", numbers == list(range(1000)), call.code().name, seen)

        said = queue.SimpleQueue()
        call = channel.stream_stream("/test.Greeter/Chatting")(iter(said.get, None), timeout=20)
        for word in (b"one", b"two", b"three"):
            said.put(word)
            print("bidi", next(call).decode())
        said.put(None)
        print("bidi", list(call), call.code().name)

        try:
            channel.unary_unary("/test.Greeter/Failing")(b"", timeout=20)
        except grpc.RpcError as error:
            print("failing", error.code().name, error.details(), dict(error.trailing_metadata())["x-seen"])

        try:
            channel.unary_unary("/test.Greeter/Nowhere")(b"", timeout=20)
        except grpc.RpcError as error:
            print("nowhere", error.code().name)

        try:
            channel.unary_unary("/test.Greeter/Sleeping")(b"", timeout=0.3)
        except grpc.RpcError as error:
            print("deadline", error.code().name)


main(*sys.argv[1:])
