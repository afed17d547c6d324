//! The refusal function: answers connections that belong to nobody.
mod answer;

use std::process::ExitCode;

use base::{Connection, Linger, Purpose, Worker};

fn main() -> ExitCode {
    base::receive(|worker: &Worker| {
        let linger = worker.linger.clone();
        move |connection| refuse(connection, linger.clone())
    })
}

/// Says why, without reading anything first, and leaves the client time to read it.
async fn refuse(connection: Connection, linger: Linger) {
    let Connection { id, protocol, purpose, socket, held, .. } = connection;
    match purpose {
        Purpose::Refuse(refusal) => {
            // The answer is shorter than an empty socket buffer; a client whose connection is gone needs none.
            let _ = socket.send_now(&answer::to(protocol, refusal));
        }
        Purpose::Serve(function) => {
            tracing::warn!(id, %function, "the gateway sent a function's connection here");
        }
    }
    linger.close(socket).await;
    drop(held);
}
