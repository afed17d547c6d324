//! A connection's first bytes: every cut into segments ends in the same verdict and route, and no offset is out of range.
#![no_main]
use common::{
    Protocol, Target,
    first_flight::{FirstFlight, Step},
    target::{authority, classify},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&cut, bytes)) = input.split_first() else { return };
    for protocol in [Protocol::Http, Protocol::Https] {
        let whole = verdict(protocol, [bytes]);
        assert!(whole == verdict(protocol, bytes.chunks(1)));
        assert!(whole == verdict(protocol, bytes.chunks(usize::from(cut) + 1)));
    }
    if let Target::Function { end, .. } = classify(bytes) {
        assert!(end <= bytes.len());
    }
    authority(bytes);
});

fn verdict<'a>(protocol: Protocol, segments: impl IntoIterator<Item = &'a [u8]>) -> (Step, Vec<u8>) {
    let mut flight = FirstFlight::new(1, protocol);
    let known = segments.into_iter().map(|segment| flight.feed(segment)).find(|step| *step != Step::More);
    (known.unwrap_or(Step::More), flight.key.name().to_vec())
}
