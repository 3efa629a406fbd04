"""The row of messages between two ranks, over a network that loses, repeats and reorders."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.sglang.handshake.link import Incoming, Outgoing

STEPS = st.lists(st.tuples(st.sampled_from(["send", "resend", "give up", "deliver"]), st.integers(0, 10)), max_size=60)


class Network:
    """Messages in flight, each with the base of its sender at that time."""

    def __init__(self) -> None:
        self.flying: list[tuple[int, int, int]] = []  # seq, base, payload
        self.sender, self.receiver = Outgoing(), Incoming()
        self.sent: list[int] = []
        self.given_up: set[int] = set()
        self.taken: list[int] = []

    def send(self) -> None:
        payload = len(self.sent)
        message = self.sender.add("transfer", str(payload), str(payload).encode(), {}, 0.0)
        self.sent.append(payload)
        self.flying.append((message.seq, self.sender.base, payload))

    def resend(self) -> None:
        self.flying += [(m.seq, self.sender.base, int(m.payload)) for m in self.sender]

    def give_up(self) -> None:
        self.given_up |= {int(m.payload) for m in self.sender.give_up()}

    def deliver(self, at: int) -> None:
        seq, base, payload = self.flying.pop(at)
        if self.receiver.take(seq, base):
            self.taken.append(payload)
        self.sender.receipt(self.receiver.last)


@given(STEPS)
def test_each_message_is_taken_once_in_order_or_was_given_up(steps: list[tuple[str, int]]) -> None:
    network = Network()
    for step, choice in steps:
        if step == "send":
            network.send()
        elif step == "resend":
            network.resend()
        elif step == "give up":
            network.give_up()
        elif network.flying:
            network.deliver(choice % len(network.flying))  # what is never chosen is lost
    for _ in range(len(network.sent) + 1):  # the network gets better
        network.flying.clear()
        network.resend()
        while network.flying:
            network.deliver(0)
    assert network.taken == sorted(set(network.taken)), "repeated or out of order"
    assert set(network.sent) - set(network.taken) <= network.given_up, "lost without a word"
    assert len(network.sender) == 0


def test_a_receiver_goes_on_after_its_sender_gave_messages_up() -> None:
    sender, receiver = Outgoing(), Incoming()
    sender.add("transfer", "1", b"", {}, 0.0)
    assert [m.room for m in sender.give_up()] == ["1"]
    message = sender.add("transfer", "2", b"", {}, 0.0)
    assert receiver.take(message.seq, sender.base)


def test_a_receipt_covers_what_came_before() -> None:
    sender = Outgoing()
    for room in "123":
        sender.add("transfer", room, b"", {}, 0.0)
    sender.receipt(2)
    assert [message.room for message in sender] == ["3"]
