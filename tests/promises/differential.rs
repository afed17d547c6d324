//! Kernel and user space judge alike: the same input has the same fate in both modes, and other people's parsers agree.
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, ensure};
use tests::{
    Stack, Verdicts,
    corpus::{self, Input},
    crowd::crowd,
    net::Net,
    oracle::{self, Route},
    pattern::Random,
    probe::{Outcome, Port, probe},
    stack::{AddressBook, DOMAINS, Plan},
};

#[test]
fn both_modes_agree_on_a_generated_corpus() {
    let seed = std::env::var("POINTSMAN_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let inputs = if tests::long() { 200_000 } else { 6000 };
    let net = Rc::new(Net::private().without_slow_start());
    let stacks =
        [Verdicts::Sockmap, Verdicts::Peek].map(|verdicts| Plan::new(verdicts).in_net(net.clone()).start());
    let [kernel, user]: [&AddressBook; 2] = stacks.each_ref().map(|stack: &Stack| &**stack);
    crowd(8, inputs, |number| {
        let input = corpus::input(&mut Random::new(seed ^ (number as u64) << 20));
        compare(kernel, user, &input).map_err(|error| anyhow!("{error:#}\n    seed {seed}, {}", input.show()))
    });
}

fn compare(kernel: &AddressBook, user: &AddressBook, input: &Input) -> Result<()> {
    let by_kernel = probe(kernel, input.port, &input.bytes, &input.manner).context("by sockmap")?;
    let by_user = probe(user, input.port, &input.bytes, &input.manner).context("by peek")?;
    let route = match input.port {
        Port::Http => oracle::http(&input.bytes),
        Port::Https => oracle::tls(&input.bytes, &DOMAINS),
    };
    // Behind the name the kernel looks no further and leaves it to the function to refuse what is broken there, in
    // its own words.
    let broken = matches!(route, Route::Malformed | Route::Incomplete);
    let same = by_kernel == by_user
        || input.port == Port::Https && broken && is_refusal(&by_kernel) && is_refusal(&by_user);
    ensure!(same, "sockmap: {by_kernel:?}, peek: {by_user:?}, the oracle: {route:?}");
    if let Outcome::Function(function) = &by_kernel {
        ensure!(route == Route::Function(function.clone()), "{function} answered, the oracle says {route:?}");
    }
    if let Some(function) = &input.function {
        ensure!(by_kernel == Outcome::Function(function.clone()), "{by_kernel:?} instead of {function}");
        ensure!(route == Route::Function(function.clone()), "{function} answered, the oracle says {route:?}");
    }
    Ok(())
}

fn is_refusal(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Alert(_) | Outcome::Closed)
}
