//! Asks a running gateway for its report.
use std::{io, net::SocketAddr, time::Duration};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use super::report::Report;

/// Longer than a gateway lets its own loop think.
const PATIENCE: Duration = Duration::from_secs(5);

/// More than thousands of functions have to tell.
const REPORT_BYTES: usize = 64 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "no gateway answers at {address}: {source}. Is `pointsman gateway` running? Its log says its admin address, and --admin takes it"
    )]
    NobodyThere { address: SocketAddr, source: io::Error },
    #[error("the gateway at {0} took longer than {PATIENCE:?} to answer")]
    Slow(SocketAddr),
    #[error("the gateway at {address} answered {status}: {body}")]
    Refused { address: SocketAddr, status: StatusCode, body: String },
    #[error("what answers at {address} is no gateway of this version: {reason}")]
    Foreign { address: SocketAddr, reason: String },
}

pub async fn fetch(address: SocketAddr) -> Result<Report, Error> {
    timeout(PATIENCE, ask(address)).await.unwrap_or(Err(Error::Slow(address)))
}

async fn ask(address: SocketAddr) -> Result<Report, Error> {
    let stream =
        TcpStream::connect(address).await.map_err(|source| Error::NobodyThere { address, source })?;
    let foreign = |reason: &dyn std::fmt::Display| Error::Foreign { address, reason: reason.to_string() };
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| foreign(&error))?;
    let request = Request::get("/status").header(HOST, address.to_string()).body(Empty::<Bytes>::new());
    let request = request.map_err(|error| foreign(&error))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| foreign(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), REPORT_BYTES).collect().await;
        Ok((status, body.map_err(|error| foreign(&error))?.to_bytes()))
    };
    tokio::pin!(connection);
    let mut connected = true;
    tokio::pin!(answer);
    let (status, body) = loop {
        tokio::select! {
            answer = &mut answer => break answer?,
            // An error of the connection is one of the answer, too.
            _ = &mut connection, if connected => connected = false,
        }
    };
    if status != StatusCode::OK {
        let body = String::from_utf8_lossy(&body).trim_end().to_owned();
        return Err(Error::Refused { address, status, body });
    }
    serde_json::from_slice(&body).map_err(|error| foreign(&error))
}
