//! The frames of a peer's connection, and the messages in them. An accepted message can be passed on, and is accepted
//! again as the same.

#![no_main]

use hawker_fuzz::{convert, messages, v1};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|stream: &[u8]| {
    // Most inputs are better spent on one message than on frames.
    let alone = v1::PeerMessage::decode(stream).ok();
    for wire in messages(stream).into_iter().chain(alone) {
        let Ok(Some(message)) = convert::from_peer_message(wire) else {
            continue;
        };
        let again = convert::peer_message(&message).encode_to_vec();
        let again = v1::PeerMessage::decode(&*again).map(convert::from_peer_message);
        assert_eq!(again, Ok(Ok(Some(message))));
    }
});
