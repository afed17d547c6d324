//! All that a gateway sees of a session that moves, and all that it could do with it: two functions' programs are
//! started, and this process is their gateway.
#[path = "../../base/tests/support/mod.rs"]
mod support;

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex},
};

use common::{FunctionName, Protocol};
use handoff::{
    Berth, Connection, Flight, FromInstance, GatewayMessage, Grant, GrantAnswer, InstanceMessage,
    MessageBuffer, Move, Purpose, SendError, WorkerId,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use ring::{
    aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    hkdf::{HKDF_SHA256, KeyType, Prk},
};
use rustls::{ClientConfig, ClientConnection, KeyLog, RootCertStore, StreamOwned};
use support::{Function, PATIENCE, Pool, connection, record};

const ECHO: WorkerId = WorkerId(1);
const TWIN: WorkerId = WorkerId(2);

const SECRET_TEXT: &str = "the-clients-own-secret";

/// A gateway between two functions that keeps everything it sees.
struct Gateway {
    _functions: [Function; 2],
    echo: Pool,
    twin: Pool,
    seen: Vec<u8>,
    authority: CertifiedIssuer<'static, KeyPair>,
}

/// A connection on its way, in the gateway's hands.
struct Travelling {
    connection: Connection,
    payload: Vec<u8>,
    socket: OwnedFd,
}

impl Travelling {
    fn message(&self) -> Move<'_> {
        Move { connection: self.connection, peer: ECHO, payload: &self.payload }
    }
}

fn name(text: &str) -> FunctionName {
    text.parse().unwrap()
}

impl Gateway {
    fn start() -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let functions = ["echo", "twin"].map(|name| start(folder.path(), &authority, name));
        let [echo, twin] = [&functions[0], &functions[1]].map(Function::connect);
        Self { _functions: functions, echo, twin, seen: Vec::new(), authority }
    }

    /// Plays the gateway until a connection is given back.
    fn until_returned(&mut self) -> Travelling {
        let mut buffer = MessageBuffer::default();
        loop {
            let mut ready =
                [&self.echo, &self.twin].map(|pool| PollFd::new(pool.end.as_fd(), PollFlags::POLLIN));
            assert!(poll(&mut ready, PollTimeout::try_from(PATIENCE).unwrap()).unwrap() > 0, "nothing came");
            for (own, other) in [(ECHO, TWIN), (TWIN, ECHO)] {
                let (from, to) =
                    if own == ECHO { (&self.echo, &self.twin) } else { (&self.twin, &self.echo) };
                match from.end.receive(&mut buffer).unwrap() {
                    FromInstance::Message(InstanceMessage::Ask(function)) => {
                        let berth = Berth { to: other, instance: other.0, worker: 0, places: 64 };
                        let grant = Grant { function, answer: GrantAnswer::Granted(berth) };
                        from.end.say(&GatewayMessage::Grant(grant)).unwrap();
                    }
                    FromInstance::Message(InstanceMessage::Flight(flight)) => {
                        self.seen.extend(flight.bytes);
                        let function = name(if own == ECHO { "echo" } else { "twin" });
                        let flight = Flight { peer: own, function, ..flight };
                        to.end.say(&GatewayMessage::Flight(flight)).unwrap();
                    }
                    FromInstance::Return(moves, mut sockets) => {
                        let ([moved], Some(socket)) = (&moves[..], sockets.next()) else {
                            panic!("several connections came");
                        };
                        assert_eq!(moved.peer, other);
                        self.seen.extend(moved.payload);
                        let payload = moved.payload.to_vec();
                        return Travelling { connection: moved.connection, payload, socket };
                    }
                    FromInstance::WouldBlock => {}
                    _ => panic!("something else came"),
                }
            }
        }
    }

    fn deliver(&self, travelling: &Travelling, to: &Pool) {
        loop {
            match to.end.send_moved(&[travelling.message()], &[travelling.socket.as_fd()]) {
                Err(SendError::WouldBlock) => {
                    let mut ready = [PollFd::new(to.end.as_fd(), PollFlags::POLLOUT)];
                    assert!(poll(&mut ready, PollTimeout::try_from(PATIENCE).unwrap()).unwrap() > 0);
                }
                sent => return assert_eq!(sent.unwrap(), 1),
            }
        }
    }

    fn client(&self, kind: &'static rustls::SupportedProtocolVersion) -> (Client, Arc<Secrets>) {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.der().clone()).unwrap();
        let mut provider = rustls::crypto::ring::default_provider();
        provider
            .cipher_suites
            .retain(|suite| suite.suite().as_str().is_some_and(|name| name.contains("AES_128_GCM")));
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[kind])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let secrets = Arc::new(Secrets::default());
        config.key_log = Arc::<Secrets>::clone(&secrets);
        let (socket, server) = connection();
        let purpose = Purpose::Serve(name("echo"));
        self.echo.end.send(&[record(1, Protocol::Https, purpose)], &[server.as_fd()]).unwrap();
        let session = ClientConnection::new(Arc::new(config), "echo.faas.local".try_into().unwrap()).unwrap();
        (StreamOwned::new(session, Recorded { socket, received: Vec::new() }), secrets)
    }
}

fn start(folder: &Path, authority: &CertifiedIssuer<'static, KeyPair>, name: &str) -> Function {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new([format!("{name}.faas.local")]).unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    let files =
        [("certificate", certificate.pem()), ("key", key.serialize_pem()), ("anchors", authority.pem())].map(
            |(role, text)| {
                let path = folder.join(format!("{name}.{role}"));
                std::fs::write(&path, text).unwrap();
                [format!("--{role}"), path.to_str().unwrap().to_owned()]
            },
        );
    let mut arguments = vec!["--name", name, "--workers", "1", "--domains", "faas.local"];
    arguments.extend(files.iter().flatten().map(String::as_str));
    Function::start(env!("CARGO_BIN_EXE_echo"), &arguments)
}

type Client = StreamOwned<ClientConnection, Recorded>;

/// What a wiretap on the connection has.
struct Recorded {
    socket: TcpStream,
    received: Vec<u8>,
}

impl Read for Recorded {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let length = self.socket.read(bytes)?;
        self.received.extend(&bytes[..length]);
        Ok(length)
    }
}

impl Write for Recorded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Secrets(Mutex<Vec<(String, Vec<u8>)>>);

impl KeyLog for Secrets {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        self.0.lock().unwrap().push((label.to_owned(), secret.to_vec()));
    }
}

impl Secrets {
    fn of(&self, label: &str) -> Vec<u8> {
        let secrets = self.0.lock().unwrap();
        secrets.iter().find(|(of, _)| of == label).unwrap_or_else(|| panic!("no {label}")).1.clone()
    }
}

fn ask(client: &mut Client, function: &str) {
    let head =
        format!("POST /function/{function} HTTP/1.1\r\nHost: echo.faas.local\r\nContent-Length: 22\r\n\r\n");
    client.write_all((head + SECRET_TEXT).as_bytes()).unwrap();
    client.flush().unwrap();
}

fn expect_answer(client: &mut Client) {
    let mut answer = Vec::new();
    while !answer.ends_with(SECRET_TEXT.as_bytes()) {
        let mut byte = [0];
        assert_eq!(client.read(&mut byte).unwrap(), 1, "{}", answer.escape_ascii());
        answer.extend(byte);
    }
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", answer.escape_ascii());
}

/// A session that was served by echo and asks for twin now.
fn about_to_move(gateway: &mut Gateway) -> (Client, Arc<Secrets>, Travelling) {
    let (mut client, secrets) = gateway.client(&rustls::version::TLS13);
    ask(&mut client, "echo");
    expect_answer(&mut client);
    ask(&mut client, "twin");
    (client, secrets, gateway.until_returned())
}

/// HKDF-Expand-Label with an empty context (RFC 8446 §7.1).
fn expand<const N: usize>(secret: &[u8], label: &[u8]) -> [u8; N] {
    struct Length(usize);
    impl KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let mut output = [0; N];
    let info = [&[0, N as u8, 6 + label.len() as u8][..], b"tls13 ", label, &[0]];
    let prk = Prk::new_less_safe(HKDF_SHA256, secret);
    prk.expand(&info, Length(N)).unwrap().fill(&mut output).unwrap();
    output
}

/// Whether a key opens one of the records that the server sent, under one of the first sequence numbers.
fn opens(key: &[u8], iv: &[u8], records: &[Vec<u8>]) -> bool {
    let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, key).unwrap());
    records.iter().any(|record| {
        (0..4u8).any(|sequence| {
            let mut nonce: [u8; 12] = iv.try_into().unwrap();
            nonce[11] ^= sequence;
            let (header, body) = record.split_at(5);
            let mut body = body.to_vec();
            let nonce = Nonce::assume_unique_for_key(nonce);
            key.open_in_place(nonce, Aad::from(header), &mut body).is_ok()
        })
    })
}

/// Tries every run of bytes as a traffic secret, and as a key with its IV behind it.
fn something_in_it_opens(seen: &[u8], records: &[Vec<u8>]) -> bool {
    let by_secret = seen
        .windows(32)
        .any(|secret| opens(&expand::<16>(secret, b"key"), &expand::<12>(secret, b"iv"), records));
    by_secret || seen.windows(28).any(|keys| opens(&keys[..16], &keys[16..], records))
}

/// The records with application data that came last, the short ones.
fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    while let [kind, _, _, high, low, ..] = *bytes {
        let (record, rest) = bytes.split_at(5 + usize::from(u16::from_be_bytes([high, low])));
        if kind == 23 {
            records.push(record.to_vec());
        }
        bytes = rest;
    }
    records.split_off(records.len() - 2)
}

#[test]
fn nothing_that_a_gateway_sees_opens_the_traffic() {
    let mut gateway = Gateway::start();
    let (mut client, secrets, travelling) = about_to_move(&mut gateway);
    gateway.deliver(&travelling, &gateway.twin);
    expect_answer(&mut client);
    ask(&mut client, "echo");
    let back = gateway.until_returned();
    gateway.deliver(&back, &gateway.echo);
    expect_answer(&mut client);

    let records = records(&client.sock.received);
    let seen = &gateway.seen;
    assert!(seen.len() > 3000, "two agreements and two moves");
    assert!(!seen.windows(SECRET_TEXT.len()).any(|window| window == SECRET_TEXT.as_bytes()));
    assert!(!something_in_it_opens(seen, &records));
    // The search finds what is there to be found, in either form.
    let secret = secrets.of("SERVER_TRAFFIC_SECRET_0");
    let keys = [&expand::<16>(&secret, b"key")[..], &expand::<12>(&secret, b"iv")].concat();
    for planted in [&secret, &keys] {
        let planted = [&seen[..500], planted, &seen[500..600]].concat();
        assert!(something_in_it_opens(&planted, &records));
    }
}

/// The client's end of a connection that is delivered with somebody else's luggage.
fn delivered_with_another_socket(gateway: &Gateway, travelling: &Travelling, to: &Pool) -> TcpStream {
    let (client, socket) = connection();
    let other = Travelling { connection: travelling.connection, payload: travelling.payload.clone(), socket };
    gateway.deliver(&other, to);
    client
}

fn is_closed_without_a_word(mut client: TcpStream) {
    let mut byte = [0];
    match client.read(&mut byte) {
        Ok(0) => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_gateway_repeats_alters_or_misdirects_is_refused() {
    let mut gateway = Gateway::start();
    let (mut client, _, travelling) = about_to_move(&mut gateway);

    // To another connection, and to another instance.
    is_closed_without_a_word(delivered_with_another_socket(&gateway, &travelling, &gateway.twin));
    let shared = |travelling: &Travelling| Travelling {
        connection: travelling.connection,
        payload: travelling.payload.clone(),
        socket: travelling.socket.try_clone().unwrap(),
    };
    let misdirected = shared(&travelling);
    let echo = Connection { purpose: Purpose::Serve(name("echo")), ..travelling.connection };
    gateway.deliver(&Travelling { connection: echo, ..misdirected }, &gateway.echo);
    // Altered, at every byte.
    for at in 0..travelling.payload.len() {
        let mut altered = shared(&travelling);
        altered.payload[at] ^= 0x10;
        gateway.deliver(&altered, &gateway.twin);
    }
    let taken = gateway.twin.status.taken();

    // None of that has used the session up or answered in it.
    gateway.deliver(&travelling, &gateway.twin);
    expect_answer(&mut client);
    assert!(gateway.twin.status.taken() > taken);

    // Again, and again when it has been elsewhere meanwhile.
    gateway.deliver(&travelling, &gateway.twin);
    ask(&mut client, "echo");
    let back = gateway.until_returned();
    gateway.deliver(&back, &gateway.echo);
    expect_answer(&mut client);
    gateway.deliver(&travelling, &gateway.twin);
    gateway.deliver(&back, &gateway.echo);
    is_closed_without_a_word(delivered_with_another_socket(&gateway, &travelling, &gateway.twin));
    ask(&mut client, "echo");
    expect_answer(&mut client);
}
