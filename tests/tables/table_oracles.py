"""What a table's look-up and optimizers compute, in plain NumPy on dense gradients, one row and one column after the other.

Each takes the dtype that it computes in: float64 is the truth, and what float32 makes of the same program says what tolerance is due.
"""

import numpy as np


def dense_gradient(rows, values, num_rows, dtype=np.float64):
    """The gradient of the table and, apart from it, which rows were read: a row's gradient may be zero."""
    grad, touched = np.zeros((num_rows, values.shape[-1]), dtype), np.zeros(num_rows, bool)
    for row, value in zip(rows.reshape(-1), values.reshape(-1, values.shape[-1])):
        if 0 <= row < num_rows:
            grad[row] += value.astype(dtype)
            touched[row] = True
    return grad, touched


class Adam:
    """Adam by its pseudo-code, on touched rows."""

    def __init__(self, table, dtype, beta1=0.9, beta2=0.95, eps=1e-20):
        self.beta1, self.beta2, self.eps, self.steps = beta1, beta2, eps, 0
        self.m, self.v = np.zeros(table.shape, dtype), np.zeros(table.shape, dtype)

    def step(self, table, grad, touched, rate):
        self.steps += 1
        for i in np.flatnonzero(touched):
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * grad[i]
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * grad[i] ** 2
            m_hat, v_hat = self.m[i] / (1 - self.beta1**self.steps), self.v[i] / (1 - self.beta2**self.steps)
            table[i] -= rate * m_hat / (np.sqrt(v_hat) + self.eps)


class SecondMoment:
    """One second moment a row; the first gradient of a row that is not zero sets it."""

    def __init__(self, table, dtype, beta2=0.95, eps=1e-20):
        self.beta2, self.eps, self.v = beta2, eps, np.zeros(len(table), dtype)

    def step(self, table, grad, touched, rate):
        for i in np.flatnonzero(touched):
            square = (grad[i] ** 2).mean()
            self.v[i] = square if self.v[i] == 0 else self.beta2 * self.v[i] + (1 - self.beta2) * square
            table[i] -= rate * grad[i] / (np.sqrt(self.v[i]) + self.eps)


class Sinkhorn:
    """The update of DeepSeek-V4.1 as its report writes it, with the whole matrix normalised in each pass."""

    def __init__(self, table, dtype, beta=0.95, passes=11, tau=1e-3, gamma=0.18):
        self.beta, self.passes, self.tau, self.gamma, self.m = beta, passes, tau, gamma, np.zeros(table.shape, dtype)

    def step(self, table, grad, touched, rate):
        self.m = self.beta * self.m + (1 - self.beta) * grad
        u = self.beta * self.m + (1 - self.beta) * grad
        lengths = np.sqrt((u**2).sum(axis=1))
        u[lengths <= self.tau * lengths.mean()] = 0
        for k in range(self.passes):
            axis = 1 if k % 2 == 0 else 0
            u = u / (np.sqrt((u**2).sum(axis=axis, keepdims=True)) + 1e-20)
        table -= self.gamma * rate * np.sqrt(table.shape[1]) * u
