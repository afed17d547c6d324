//! Connections that are opened and then only held: idle ones, and those that never complete their first flight.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use super::http::{self, Reader};
use super::order::{Held, Order, Seen};
use super::stream::Stream;
use super::tls;

/// How many are being opened at a time.
const AT_ONCE: usize = 32;
/// Ends before the function's name in either flight, so that nobody can judge it.
const HALF_BYTES: usize = 12;
/// A side that needs longer for one is in trouble.
const PATIENCE: Duration = Duration::from_secs(20);

/// Keeps what was opened until it has been opened all, said so, and the input has ended.
pub fn run(order: &Order, count: usize, what: Held) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let began = Instant::now();
    let held = runtime.block_on(LocalSet::new().run_until(open(order, count, what)))?;
    let seen =
        Seen { elapsed_s: began.elapsed().as_secs_f64(), requests: held.len() as u64, ..Seen::default() };
    println!("{}", serde_json::to_string(&seen)?);
    super::wait_for_the_end_of_input()?;
    drop(held);
    Ok(ExitCode::SUCCESS)
}

enum Connection {
    Idle(#[expect(dead_code, reason = "it is only kept open")] Stream),
    Half(#[expect(dead_code, reason = "it is only kept open")] TcpStream),
}

async fn open(order: &Order, count: usize, what: Held) -> Result<Vec<Connection>> {
    let client = order.tls.as_ref().map(tls::Client::new).transpose()?;
    let mut held = Vec::with_capacity(count);
    let mut opening = JoinSet::new();
    for index in 0..count + AT_ONCE {
        if index >= AT_ONCE
            && let Some(opened) = opening.join_next().await
        {
            held.push(opened??);
        }
        if index < count {
            let (order, client) = (order.clone(), client.clone());
            opening.spawn_local(async move {
                timeout(PATIENCE, open_one(&order, client.as_ref(), what))
                    .await
                    .context("no answer in time")?
            });
        }
    }
    while let Some(opened) = opening.join_next().await {
        held.push(opened??);
    }
    if held.len() != count {
        bail!("{} of {count} connections were opened", held.len());
    }
    Ok(held)
}

async fn open_one(order: &Order, client: Option<&tls::Client>, what: Held) -> Result<Connection> {
    let request = order.requests.first().context("the order has no request")?;
    match what {
        Held::Idle => {
            let mut stream = Stream::connect(order.address, &request.host, client).await?;
            stream.write_all(&http::get(request, false)).await?;
            Reader::new().answer(&mut stream, |_| ()).await?;
            Ok(Connection::Idle(stream))
        }
        Held::HalfFlight => {
            let mut flight = Vec::new();
            match client {
                Some(client) => {
                    client.begin(&request.host)?.write_tls(&mut flight)?;
                }
                None => flight = http::get(request, false),
            }
            let mut socket = TcpStream::connect(order.address).await?;
            socket.write_all(&flight[..HALF_BYTES]).await?;
            Ok(Connection::Half(socket))
        }
    }
}
