//! Clients that know nothing of moves notice nothing of them: curl, openssl and Python, on one connection each.
use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use tests::{Stack, Verdicts, programs, stack::host};

in_both_modes!(curl, openssl_with_key_updates, python);

/// The body that a function answers with to a GET of `?name=NAME`.
fn expected(function: &str, name: &str) -> String {
    match function {
        "hello" => format!("Hello, {name}!"),
        _ => format!("\"query\":\"name={name}\""),
    }
}

fn curl(verdicts: Verdicts) -> Result<()> {
    const REQUESTS: usize = 100;
    let stack = Stack::start(verdicts);
    let functions = |index: usize| ["echo", "hello"][index % 2];
    let origins = [
        (format!("http://{}", stack.http), vec![]),
        (format!("https://{}:{}", host("echo"), stack.https.port()), vec!["--tlsv1.3"]),
        (format!("https://{}:{}", host("echo"), stack.https.port()), vec!["--tls-max", "1.2"]),
    ];
    for (origin, version) in origins {
        let mut command = Command::new(programs::client("curl", "curl"));
        command
            .args(["-sS", "--fail", "--max-time", "60", "--cacert"])
            .arg(stack.authority.path())
            .args(version);
        command.arg("--resolve").arg(format!("{}:{}:127.0.0.1", host("echo"), stack.https.port()));
        command.args(["--write-out", "\nconnects %{num_connects} status %{http_code}\n"]);
        command
            .args((0..REQUESTS).map(|index| format!("{origin}/function/{}?name=n{index}", functions(index))));
        let output = command.output().context("running curl")?;
        let said = String::from_utf8_lossy(&output.stdout);
        let context = || format!("{origin}: {said}{}", String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{}", context());
        ensure!(said.matches("status 200").count() == REQUESTS, "{}", context());
        ensure!(said.matches("connects 1 ").count() == 1, "more than one connection: {}", context());
        ensure!(said.matches("connects 0 ").count() == REQUESTS - 1, "{}", context());
        for index in 0..REQUESTS {
            ensure!(
                said.contains(&expected(functions(index), &format!("n{index}"))),
                "{index}: {}",
                context()
            );
        }
    }
    Ok(())
}

/// `openssl s_client`, which takes requests and its own commands by lines.
struct SClient {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl SClient {
    fn start(stack: &Stack, options: &[&str]) -> Result<Self> {
        let name = host("echo");
        let mut command = Command::new(programs::client("openssl", "openssl"));
        command.args([
            "s_client",
            "-msg",
            "-verify_return_error",
            "-servername",
            &name,
            "-verify_hostname",
            &name,
        ]);
        command.arg("-CAfile").arg(stack.authority.path()).args(options);
        command.arg("-connect").arg(stack.https.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context("starting openssl")?;
        let input = child.stdin.take().context("openssl's input")?;
        let output = BufReader::new(child.stdout.take().context("openssl's output")?);
        Ok(Self { child, input, output })
    }

    /// Types all at once: what openssl reads is a command or text as a whole.
    fn type_in(&mut self, text: &str) -> Result<()> {
        Ok(self.input.write_all(text.as_bytes())?)
    }

    fn wait_for(&mut self, text: &str) -> Result<()> {
        self.wait_for_line_with(&[text])
    }

    fn wait_for_line_with(&mut self, parts: &[&str]) -> Result<()> {
        let mut seen = String::new();
        loop {
            let start = seen.len();
            let length = self.output.read_line(&mut seen)?;
            ensure!(length > 0, "no {parts:?} in:\n{seen}");
            if parts.iter().all(|part| seen[start..].contains(part)) {
                return Ok(());
            }
        }
    }

    /// Updates the keys. The command must have been read before more is typed, or it is taken for text.
    fn update_keys(&mut self, letter: &str) -> Result<()> {
        self.type_in(&format!("{letter}\n"))?;
        self.wait_for_line_with(&[">>>", "KeyUpdate"])
    }

    fn ask(&mut self, function: &str, name: &str) -> Result<()> {
        let request =
            format!("GET /function/{function}?name={name} HTTP/1.1\r\nHost: echo.faas.local\r\n\r\n");
        self.type_in(&request)?;
        self.wait_for("HTTP/1.1 200 OK")?;
        self.wait_for(&expected(function, name))
    }
}

impl Drop for SClient {
    fn drop(&mut self) {
        // Ends it whether or not the test came to its end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn openssl_with_key_updates(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    for suite in ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"] {
        let mut client = SClient::start(&stack, &["-tls1_3", "-ciphersuites", suite])?;
        for round in 0..10 {
            client.ask("echo", &format!("a{round}")).with_context(|| format!("{suite}, round {round}"))?;
            // K asks the other end for an update as well, k doesn't.
            let letter = if round % 2 == 0 { "K" } else { "k" };
            client.update_keys(letter)?;
            client.ask("hello", &format!("b{round}")).with_context(|| format!("{suite}, round {round}"))?;
            client.update_keys(letter)?;
        }
    }
    for suite in
        ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"]
    {
        let mut client = SClient::start(&stack, &["-tls1_2", "-cipher", suite])?;
        for round in 0..10 {
            client.ask("echo", &format!("a{round}")).with_context(|| format!("{suite}, round {round}"))?;
            client.ask("hello", &format!("b{round}")).with_context(|| format!("{suite}, round {round}"))?;
        }
    }
    Ok(())
}

fn python(verdicts: Verdicts) -> Result<()> {
    const PROGRAM: &str = "
import http.client, hashlib, socket, ssl, sys
authority, name, http_port, https_port = sys.argv[1:]
def connections():
    yield socket.create_connection(('127.0.0.1', int(http_port)), 60)
    for version in ['TLSv1_2', 'TLSv1_3']:
        context = ssl.create_default_context(cafile=authority)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        raw = socket.create_connection(('127.0.0.1', int(https_port)), 60)
        yield context.wrap_socket(raw, server_hostname=name)
for connection in connections():
    for index in range(200):
        body = hashlib.sha256(str(index).encode()).digest() * (1 + index * 7 % 900)
        head = f'POST /function/echo HTTP/1.1\\r\\nHost: {name}\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n'
        connection.sendall(head.encode() + body)
        answer = http.client.HTTPResponse(connection); answer.begin()
        assert answer.status == 200 and answer.read() == body, index
        connection.sendall(f'GET /function/hello?name=n{index} HTTP/1.1\\r\\nHost: {name}\\r\\n\\r\\n'.encode())
        answer = http.client.HTTPResponse(connection); answer.begin()
        assert answer.status == 200 and f'Hello, n{index}!' in answer.read().decode(), index
    if isinstance(connection, ssl.SSLSocket):
        connection = connection.unwrap()
    connection.close()
print('done')
";
    let stack = Stack::start(verdicts);
    let mut command = Command::new(programs::client("python3", "python3"));
    command.args(["-c", PROGRAM]).arg(stack.authority.path()).arg(host("echo"));
    command.args([stack.http.port(), stack.https.port()].map(|port| port.to_string()));
    let output = command.output().context("running python3")?;
    let said = [&output.stdout[..], &output.stderr].concat();
    ensure!(output.status.success() && said == b"done\n", "{}", String::from_utf8_lossy(&said));
    Ok(())
}
