//! Sessions with the clients that people use: openssl s_client, curl and Python.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};

use super::*;

/// A running openssl s_client, ended when the test ends.
struct SClient {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    messages: BufReader<ChildStderr>,
}

impl SClient {
    fn connect(server: &Server, options: &[&str]) -> Self {
        let mut child = Command::new("openssl")
            .args(["s_client", "-connect", &server.address.to_string(), "-servername", "echo.faas.local"])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("openssl runs");
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let messages = BufReader::new(child.stderr.take().unwrap());
        let mut client = Self { child, input, output, messages };
        client.expect_output("Verify return code");
        client
    }

    fn expect_output(&mut self, wanted: &str) {
        expect(&mut self.output, wanted);
    }

    fn expect_message(&mut self, wanted: &str) {
        expect(&mut self.messages, wanted);
    }

    /// In one write, because s_client acts on a command's first byte and may be gone after it.
    fn send_line(&mut self, line: &str) {
        self.input.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn echoes(&mut self, line: &str) {
        self.send_line(line);
        self.expect_output(line);
    }
}

impl Drop for SClient {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

fn expect(from: &mut impl BufRead, wanted: &str) {
    let mut seen = String::new();
    loop {
        let start = seen.len();
        assert!(from.read_line(&mut seen).unwrap() > 0, "{wanted:?} is not in:\n{seen}");
        if seen[start..].contains(wanted) {
            return;
        }
    }
}

fn moving_server(site: &Site) -> Server {
    Server::start(site.acceptor(), |stream| echo(stream, async |stream| moved(stream).await))
}

#[test]
fn openssl_speaks_every_suite() {
    for (suite, site) in all_suites() {
        let name = format!("{:?}", suite.suite());
        let options = match suite {
            SupportedCipherSuite::Tls13(_) => {
                ["-tls1_3".to_owned(), "-ciphersuites".to_owned(), name.replace("TLS13_", "TLS_")]
            }
            SupportedCipherSuite::Tls12(_) => {
                let name = name
                    .replace("TLS_ECDHE_", "ECDHE-")
                    .replace("_WITH_", "-")
                    .replace("AES_", "AES")
                    .replace("_SHA256", if name.contains("CHACHA") { "" } else { "_SHA256" })
                    .replace('_', "-");
                ["-tls1_2".to_owned(), "-cipher".to_owned(), name]
            }
        };
        let server = moving_server(site);
        let mut client = SClient::connect(&server, &options.each_ref().map(String::as_str));
        for round in 0..20 {
            client.echoes(&format!("line {round} with {}", "x".repeat(round * 100)));
        }
        client.send_line("Q");
        assert!(client.child.wait().unwrap().success(), "{suite:?}");
        server.assert_served();
    }
}

#[test]
fn openssl_updates_keys_around_moves() {
    for suite in ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"] {
        let server = moving_server(ecdsa_site());
        let mut client = SClient::connect(&server, &["-tls1_3", "-ciphersuites", suite]);
        client.echoes("before");
        for round in 0..10 {
            // K asks for ours, k doesn't.
            let command = if round % 2 == 0 { "K" } else { "k" };
            client.send_line(command);
            client.expect_message("KEYUPDATE");
            client.echoes(&format!("after {command}, round {round}"));
            client.echoes(&format!("and again, round {round}"));
        }
        client.send_line("Q");
        assert!(client.child.wait().unwrap().success());
        server.assert_served();
    }
}

#[test]
fn openssl_may_not_renegotiate() {
    for cipher in ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"] {
        let server = moving_server(ecdsa_site());
        let mut client = SClient::connect(&server, &["-tls1_2", "-cipher", cipher]);
        client.echoes("before");
        client.send_line("R");
        client.expect_message("RENEGOTIATING");
        client.expect_message("no renegotiation");
    }
}

#[test]
fn openssl_resumes_with_a_ticket() {
    for (version, label) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let server = moving_server(ecdsa_site());
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("session").display().to_string();
        let mut client = SClient::connect(&server, &[version, "-sess_out", &file]);
        client.echoes("first");
        client.send_line("Q");
        assert!(client.child.wait().unwrap().success());
        server.assert_served();

        let mut child = Command::new("openssl")
            .args(["s_client", "-connect", &server.address.to_string(), version, "-sess_in", &file])
            .args(["-servername", "echo.faas.local"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        expect(&mut BufReader::new(child.stdout.take().unwrap()), &format!("Reused, {label}"));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn openssl_is_told_of_a_wrong_protocol() {
    let server = moving_server(ecdsa_site());
    let output = Command::new("openssl")
        .args(["s_client", "-connect", &server.address.to_string(), "-alpn", "h2"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(messages.contains("alert no application protocol"), "{messages}");
    assert!(matches!(server.outcome(), Outcome::Refused(_)));
}

/// Answers each GET with its target, moving before every answer.
async fn targets(mut stream: TlsStream) -> io::Result<()> {
    let mut received = Vec::new();
    loop {
        while let Some(end) = received.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8(received.drain(..end + 4).collect()).unwrap();
            let target = head.split(' ').nth(1).unwrap().to_owned();
            stream = moved(stream).await;
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{target}", target.len());
            stream.write_all(answer.as_bytes()).await?;
        }
        if stream.read_buf(&mut received).await? == 0 {
            return stream.shutdown().await;
        }
    }
}

#[test]
fn curl_keeps_one_connection_through_moves() {
    let site = ecdsa_site();
    let directory = tempfile::tempdir().unwrap();
    let authority = directory.path().join("authority.pem");
    std::fs::write(&authority, &site.authority_pem).unwrap();
    for version in ["1.2", "1.3"] {
        let server = Server::start(site.acceptor(), targets);
        let port = server.address.port();
        let targets: Vec<String> = (0..100).map(|index| format!("/target/{index}")).collect();
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--fail", "--max-time", "30"])
            .args(["--tlsv1.2", "--tls-max", version, "--cacert"])
            .arg(&authority)
            .args(["--resolve", &format!("echo.faas.local:{port}:127.0.0.1")])
            .args(["--write-out", " %{num_connects} %{http_version} %{ssl_verify_result}\n"])
            .args(targets.iter().map(|target| format!("https://echo.faas.local:{port}{target}")))
            .output()
            .expect("curl runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let expected: String = targets
            .iter()
            .enumerate()
            .map(|(index, target)| format!("{target} {} 1.1 0\n", u8::from(index == 0)))
            .collect();
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    }
}

const PYTHON: &str = r#"
import hashlib, socket, ssl, sys
port, version, authority = int(sys.argv[1]), sys.argv[2], sys.argv[3]
context = ssl.create_default_context(cafile=authority)
context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
context.set_alpn_protocols(["http/1.1"])
with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="echo.faas.local") as tls:
    assert tls.selected_alpn_protocol() == "http/1.1"
    for index in range(300):
        message = hashlib.sha256(str(index).encode()).digest() * (1 + index * 7 % 900)
        tls.sendall(message)
        answer = bytearray()
        while len(answer) < len(message):
            piece = tls.recv(len(message) - len(answer))
            assert piece, "closed early"
            answer += piece
        assert answer == message
    tls.unwrap()
print("done")
"#;

#[test]
fn python_gets_every_byte_back() {
    let site = ecdsa_site();
    let directory = tempfile::tempdir().unwrap();
    let authority = directory.path().join("authority.pem");
    std::fs::write(&authority, &site.authority_pem).unwrap();
    for version in ["TLSv1_2", "TLSv1_3"] {
        let server = moving_server(site);
        let output = Command::new("python3")
            .args(["-c", PYTHON, &server.address.port().to_string(), version])
            .arg(&authority)
            .output()
            .expect("python3 runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout, b"done\n");
        server.assert_served();
    }
}

#[test]
fn a_client_of_the_wrong_authority_gives_up_with_an_alert() {
    let site = ecdsa_site();
    let server = moving_server(site);
    let status = Command::new("curl")
        .args(["--silent", &format!("https://{}/", server.address)])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(60), "curl says that it doesn't trust the certificate");
    match server.outcome() {
        Outcome::Refused(HandshakeError::Tls(error)) => {
            assert_eq!(*error, rustls::Error::AlertReceived(rustls::AlertDescription::UnknownCA));
        }
        outcome => panic!("{outcome:?}"),
    }
}
