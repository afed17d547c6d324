//! One thread's clients: each does the same again and again until the time is over.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::task::LocalSet;
use tokio::time::{sleep, timeout};

use super::http::{self, Reader};
use super::order::{Load, Order, Request};
use super::recorder::{Phase, Recorder};
use super::stream::Stream;
use super::tls;

/// What takes longer is an error.
const PATIENCE: Duration = Duration::from_secs(5);
/// After an error a client rests, so that a side that refuses everything isn't flooded.
const REST: Duration = Duration::from_millis(5);
const PIECE_BYTES: usize = 64 * 1024;
/// What a client of another protocol might send: neither a method nor a TLS record, and no end of line.
const GARBAGE: [u8; 64] = [0xf5; 64];

pub struct Clients {
    order: Order,
    phase: Arc<Phase>,
}

/// One client of many.
struct Client {
    order: Order,
    phase: Arc<Phase>,
    tls: Option<tls::Client>,
    requests: Vec<Vec<u8>>,
    reader: Reader,
    recorder: Rc<RefCell<Recorder>>,
    full_handshakes: u64,
}

impl Clients {
    pub fn new(order: &Order, phase: Arc<Phase>) -> Result<Self> {
        if order.requests.is_empty() {
            bail!("the order has no request");
        }
        Ok(Self { order: order.clone(), phase })
    }

    pub async fn run(self, count: usize) -> Result<Recorder> {
        let recorder = Rc::new(RefCell::new(Recorder::new()));
        let tasks = LocalSet::new();
        for _ in 0..count {
            let mut client = Client::new(&self.order, &self.phase, &recorder)?;
            tasks.spawn_local(async move { client.run().await });
        }
        tasks.await;
        Ok(recorder.replace(Recorder::new()))
    }
}

impl Client {
    fn new(order: &Order, phase: &Arc<Phase>, recorder: &Rc<RefCell<Recorder>>) -> Result<Self> {
        let bytes = |request: &Request| match order.load {
            Load::Upload { bytes } => http::post(request, bytes),
            Load::Garbage => GARBAGE.to_vec(),
            load => http::get(request, load == Load::NewConnections),
        };
        Ok(Self {
            tls: order.tls.as_ref().map(tls::Client::new).transpose()?,
            requests: order.requests.iter().map(bytes).collect(),
            order: order.clone(),
            phase: Arc::clone(phase),
            reader: Reader::new(),
            recorder: Rc::clone(recorder),
            full_handshakes: 0,
        })
    }

    async fn run(&mut self) {
        while !self.is_over() {
            let turn = match self.order.load {
                Load::NewConnections => self.new_connection().await,
                Load::Garbage => self.garbage().await,
                _ => self.keep_alive().await,
            };
            if let Err(error) = turn {
                if self.is_measured() {
                    self.recorder.borrow_mut().failed(&error);
                }
                sleep(REST).await;
            }
        }
    }

    async fn new_connection(&mut self) -> Result<()> {
        let (began, measured) = (Instant::now(), self.is_measured());
        patiently(async {
            let mut stream = self.connect().await?;
            stream.write_all(&self.requests[0]).await?;
            self.reader.answer(&mut stream, |_| ()).await?;
            self.reader.end(&mut stream).await?;
            self.check_resumption(&stream)
        })
        .await?;
        self.answered(began, measured);
        Ok(())
    }

    async fn keep_alive(&mut self) -> Result<()> {
        let mut stream = patiently(self.connect()).await?;
        let mut turn = 0;
        while !self.is_over() {
            let (began, measured) = (Instant::now(), self.is_measured());
            match self.order.load {
                Load::Download { .. } | Load::Upload { .. } => self.transfer(&mut stream).await?,
                _ => {
                    patiently(async {
                        stream.write_all(&self.requests[turn % self.requests.len()]).await?;
                        self.reader.answer(&mut stream, |_| ()).await
                    })
                    .await?;
                }
            }
            self.answered(began, measured);
            turn += 1;
        }
        Ok(())
    }

    /// One large body; what has passed when the time is over counts, the rest is given up.
    async fn transfer(&mut self, stream: &mut Stream) -> Result<()> {
        let (phase, recorder) = (Arc::clone(&self.phase), Rc::clone(&self.recorder));
        let progress = |bytes| {
            if phase.measure.load(Ordering::Relaxed) && !phase.stop.load(Ordering::Relaxed) {
                recorder.borrow_mut().moved(bytes);
            }
        };
        stream.write_all(&self.requests[0]).await?;
        if let Load::Upload { bytes } = self.order.load {
            let piece = vec![b'x'; PIECE_BYTES];
            let mut rest = bytes;
            while rest > 0 && !self.is_over() {
                let length = rest.min(PIECE_BYTES as u64);
                patiently(stream.write_all(&piece[..length as usize])).await?;
                progress(length);
                rest -= length;
            }
            if rest > 0 {
                return Ok(());
            }
            patiently(self.reader.answer(stream, |_| ())).await?;
            return Ok(());
        }
        let Load::Download { bytes } = self.order.load else { return Ok(()) };
        let length = patiently(self.reader.answer(stream, progress)).await?;
        if length != bytes {
            bail!("the answer has another length than was asked for");
        }
        Ok(())
    }

    async fn garbage(&mut self) -> Result<()> {
        let (began, measured) = (Instant::now(), self.is_measured());
        patiently(async {
            let mut stream = Stream::connect(self.order.address, "", None).await?;
            stream.write_all(&self.requests[0]).await?;
            // An answer and a reset are both an end.
            let _ = self.reader.end(&mut stream).await;
            Ok(())
        })
        .await?;
        self.answered(began, measured);
        Ok(())
    }

    async fn connect(&self) -> Result<Stream> {
        Stream::connect(self.order.address, &self.order.requests[0].host, self.tls.as_ref()).await
    }

    /// A client's first session can't be resumed; later ones that aren't would be another work than was asked for.
    fn check_resumption(&mut self, stream: &Stream) -> Result<()> {
        let wanted = self.tls.as_ref().is_some_and(|tls| tls.resume);
        if wanted && !stream.is_resumed() {
            self.full_handshakes += 1;
            if self.full_handshakes > 1 {
                bail!("the session was not resumed");
            }
        }
        Ok(())
    }

    fn answered(&self, began: Instant, measured: bool) {
        if measured && !self.is_over() {
            self.recorder.borrow_mut().answered(began.elapsed());
        }
    }

    fn is_measured(&self) -> bool {
        self.phase.measure.load(Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        self.phase.stop.load(Ordering::Relaxed)
    }
}

async fn patiently<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(PATIENCE, work).await.context("no answer in time")?
}
